//! config.json of any content.

use std::path::Component;

use super::resources;
use super::*;
use crate::error::message;

/// A config.json. Checked: what is refused is refused with a reason; what is taken has a process with words,
/// a group that leads down, copies and folders in memory at whole paths, and limits that are within
/// what a microVM can have; not more is noted than a log is to have; understood again it is the same.
pub fn oci_config(bytes: &[u8]) {
    let Ok(config) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    let bundle = Path::new("/nonexistent/bundle");
    let container = match understand(bundle, config.clone()) {
        Ok(container) => container,
        Err(error) => {
            let text = message(&*error);
            assert!(!text.is_empty());
            return;
        }
    };
    let words = container.process["args"]
        .as_array()
        .expect("there are words");
    assert!(!words.is_empty() && words.iter().all(Value::is_string));
    match &container.cgroup {
        Some(Place::Below(group)) => {
            let mut parts = group.components();
            assert!(parts.clone().count() > 0);
            assert!(parts.all(|one| matches!(one, Component::Normal(_))));
        }
        Some(Place::Scope(scope)) => {
            let slice = scope.slice.as_deref().unwrap_or("system.slice");
            let path = place::slice_path(slice).join(&scope.unit);
            let mut parts = path.components();
            assert!(parts.all(|one| matches!(one, Component::Normal(_))));
            assert!(scope.unit.ends_with(".scope") && scope.unit.len() <= 255);
        }
        None => {}
    }
    for (_, to) in &container.mounts.copies {
        assert!(to.is_absolute(), "{}", to.display());
    }
    for (at, _) in &container.mounts.tmpfs {
        assert!(at.is_absolute() && !at.components().any(|one| one == Component::ParentDir));
    }
    let vcpus = resources::vcpus(&container.resources, 1);
    assert!((1..=32).contains(&vcpus));
    assert!(resources::memory_mib(&container.resources, 128).unwrap() > 0);
    let settings = resources::settings(&container.resources);
    assert!(settings.len() < 200);
    // LEFT_OUT, what is unknown, and a few of each mount and limit.
    let mounts = config["mounts"].as_array().map_or(0, Vec::len);
    assert!(
        container.notes.len() < 100 + 4 * mounts,
        "{:?}",
        container.notes
    );
    assert!(process_text(&container.process).is_ok());
    let again = understand(bundle, config).unwrap();
    assert_eq!(format!("{again:?}").len(), format!("{container:?}").len());
}
