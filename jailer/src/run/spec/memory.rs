//! What `--tmpfs` says: where memory is mounted in a guest, and how. Pure.

use crate::args::Why;
use crate::run::agent::Memory;

/// Options of mount(8) that are a flag of mount(2), and whether they set it.
const FLAGS: [(&str, u32, bool); 12] = [
    ("ro", 1, true),
    ("rw", 1, false),
    ("nosuid", 2, true),
    ("suid", 2, false),
    ("nodev", 4, true),
    ("dev", 4, false),
    ("noexec", 8, true),
    ("exec", 8, false),
    ("sync", 16, true),
    ("async", 16, false),
    ("noatime", 1024, true),
    ("relatime", 1 << 21, true),
];
/// Those of tmpfs(5), each with a value.
const VALUES: [&str; 6] = ["size", "nr_blocks", "nr_inodes", "mode", "uid", "gid"];

/// Reads `PATH` or `PATH:OPTIONS`.
pub fn memory_mount(text: &str) -> Result<Memory, Why> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') || path.split('/').all(|name| name.is_empty() || name == ".") {
        return Err("it is not an absolute path of a folder".into());
    }
    let mut memory = Memory {
        path: path.to_owned(),
        flags: 0,
        options: String::new(),
    };
    for option in options.split(',').filter(|option| !option.is_empty()) {
        if let Some((_, flag, sets)) = FLAGS.iter().find(|(name, ..)| *name == option) {
            match sets {
                true => memory.flags |= flag,
                false => memory.flags &= !flag,
            }
            continue;
        }
        let name = option.split_once('=').map(|(name, _)| name);
        if !name.is_some_and(|name| VALUES.contains(&name)) {
            return Err(format!("its option {option:?} is not one of a tmpfs here").into());
        }
        if !memory.options.is_empty() {
            memory.options.push(',');
        }
        memory.options.push_str(option);
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_those_of_a_tmpfs_or_refused() {
        let memory = memory_mount("/run:rw,nosuid,nodev,size=65536k,mode=755,noexec,exec").unwrap();
        assert_eq!((&*memory.path, memory.flags), ("/run", 2 | 4));
        assert_eq!(memory.options, "size=65536k,mode=755");
        assert_eq!(memory_mount("/x").unwrap().options, "");
        for text in ["x", "/", "//.", "/x:tmpcopyup", "/x:size", "/x:context=a"] {
            assert!(memory_mount(text).is_err(), "{text}");
        }
    }
}
