use super::*;
use crate::testing::Folder;

/// A shape with this text for the machine's.
fn shape(machine: &str) -> Shape {
    let file = rustix::fs::memfd_create("template-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let program = std::env::current_exe().and_then(File::open).unwrap();
    use std::os::fd::AsFd as _;
    loop {
        let shape = Shape::of(&Parts {
            monitor: program.as_fd(),
            kernel: program.as_fd(),
            initramfs: file.as_fd(),
            machine,
        });
        match shape {
            Ok(shape) => return shape,
            // The program may have been built just now.
            Err(why) => assert!(why.contains("less than 2 seconds ago"), "{why}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// Puts a template with this state in place, which is none that could be loaded.
fn keep(store: &Store, shape: &Shape, state: &str) {
    let work = store.begin().unwrap();
    fs::write(work.path().join(STATE_NAME), state).unwrap();
    store.keep(work, shape).unwrap();
}

#[test]
fn template_is_found_by_all_of_its_shape() {
    let folder = Folder::new("template-shape");
    let store = Store::open(&folder.path().join("made")).unwrap();
    let (one, other) = (shape("one"), shape("other"));
    assert_ne!(one.name(), other.name());
    assert_eq!(one.bytes(), shape("one").bytes());
    assert!(matches!(store.find(&one), Found::Nothing));
    keep(&store, &one, "no state");
    assert!(matches!(store.find(&other), Found::Nothing));
    let Found::Damaged(why) = store.find(&one) else {
        panic!("it has no state that could be read");
    };
    assert!(!why.contains("shape"), "{why}");
    // As if both had one name.
    fs::rename(store.place(&one), store.place(&other)).unwrap();
    let found = store.find(&other);
    assert!(matches!(found, Found::Damaged(why) if why.contains("its shape is another")));
}

#[test]
fn template_that_is_made_twice_is_the_later_one_and_nothing_else_is_left() {
    let folder = Folder::new("template-twice");
    let store = Store::open(folder.path()).unwrap();
    let shape = shape("twice");
    for state in ["first", "second"] {
        keep(&store, &shape, state);
        let kept = fs::read_to_string(store.place(&shape).join(STATE_NAME));
        assert_eq!(kept.unwrap(), state);
    }
    assert_eq!(fs::read_dir(folder.path().join(WORK)).unwrap().count(), 0);
}

#[test]
fn template_is_put_in_place_also_where_renames_take_no_flags() {
    let folder = Folder::new("template-flags");
    let to = folder.path().join("to");
    let from = folder.path().join("1-0");
    let rename = |flags| rustix::fs::renameat_with(CWD, &from, CWD, &to, flags);
    // CIFS has the first only, and NFS none.
    for (number, all_but_exchange) in [true, false, false, true].into_iter().enumerate() {
        fs::create_dir(&from).unwrap();
        fs::write(from.join(STATE_NAME), number.to_string()).unwrap();
        let rename = |flags| match all_but_exchange && flags == RenameFlags::NOREPLACE {
            true => rename(flags),
            false => Err(Errno::INVAL),
        };
        put_in_place(&from, &to, rename).unwrap();
        let kept = fs::read_to_string(to.join(STATE_NAME)).unwrap();
        assert_eq!(kept, number.to_string());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    put_in_place(&from, &to, |_| Err(Errno::ACCESS)).unwrap_err();
}

#[test]
fn template_that_was_not_used_for_longest_goes_when_there_are_too_many() {
    let folder = Folder::new("template-prune");
    let store = Store::open(folder.path()).unwrap();
    fs::create_dir(folder.path().join("of the user")).unwrap();
    let shapes: Vec<_> = (0..=MOST).map(|n| shape(&n.to_string())).collect();
    for (age, shape) in shapes.iter().enumerate() {
        keep(&store, shape, "state");
        let file = File::open(store.place(shape).join(SHAPE)).unwrap();
        let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + age as u64);
        // The first one was used last.
        let used = if age == 0 { SystemTime::now() } else { used };
        file.set_modified(used).unwrap();
    }
    let is_there: Vec<_> = shapes.iter().map(|it| store.place(it).exists()).collect();
    let expected: Vec<_> = (0..=MOST).map(|n| n != 1).collect();
    assert_eq!(is_there, expected);
    assert!(folder.path().join("of the user").exists());
}

#[test]
fn what_a_killed_maker_left_goes_and_what_another_makes_stays() {
    let folder = Folder::new("template-left");
    let store = Store::open(folder.path()).unwrap();
    let left = folder.path().join(WORK).join("1-1");
    fs::create_dir_all(left.join("more")).unwrap();
    let one = store.begin().unwrap();
    assert!(!left.exists());
    let other = store.begin().unwrap();
    assert!(one.path().exists() && one.path() != other.path());
    let path = one.path().to_owned();
    drop(one);
    assert!(!path.exists() && other.path().exists());
}

#[test]
fn folder_that_others_can_write_to_is_refused() {
    let folder = Folder::new("template-foreign");
    for mode in [0o777, 0o770] {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).unwrap();
        let text = crate::error::message(&Store::open(folder.path()).unwrap_err());
        assert!(text.contains("other users can write to it"), "{text}");
    }
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    Store::open(&file).unwrap_err();
}

#[test]
fn template_with_a_file_that_others_can_write_to_is_not_used() {
    let folder = Folder::new("template-foreign-file");
    let store = Store::open(folder.path()).unwrap();
    let shape = shape("foreign file");
    let names = [STATE_NAME, MEMORY_NAME];
    for name in names {
        let work = store.begin().unwrap();
        let state = work.path().join(STATE_NAME);
        fs::write(&state, "state").unwrap();
        // As with a umask that leaves groups their access.
        fs::set_permissions(&state, fs::Permissions::from_mode(0o664)).unwrap();
        store.keep(work, &shape).unwrap();
        let kept = fs::metadata(store.place(&shape).join(STATE_NAME)).unwrap();
        assert_eq!(kept.mode() & 0o777, 0o600);
        for file in names {
            let path = store.place(&shape).join(file);
            fs::write(&path, "state").unwrap();
            let mode = if file == name { 0o620 } else { 0o600 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let Found::Damaged(why) = store.find(&shape) else {
            panic!("{name} can be written to by a group");
        };
        let expected = format!("its {name}: other users can write to it");
        assert_eq!(why, expected);
    }
}

#[test]
fn file_that_was_just_changed_has_no_shape() {
    use std::os::fd::AsFd as _;
    let folder = Folder::new("template-fresh");
    let path = folder.path().join("kernel");
    fs::write(&path, "kernel").unwrap();
    let file = File::open(path).unwrap();
    let why = Shape::of(&Parts {
        monitor: file.as_fd(),
        kernel: file.as_fd(),
        initramfs: file.as_fd(),
        machine: "",
    })
    .unwrap_err();
    assert!(why.contains("changed less than 2 seconds ago"), "{why}");
}
