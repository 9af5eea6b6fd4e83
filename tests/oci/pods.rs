//! Sandboxes of pods: what Kubernetes' engines make first, for the network of a pod's container.

use super::common::{self, needs};
use super::{Engine, Value};
use serde_json::json;

fn sandbox(engine: &Engine, kind: &str, more: impl FnOnce(&mut Value)) {
    engine.configure(|config| {
        config["annotations"] = json!({ kind: "sandbox" });
        config["process"]["args"] = json!(["/pause"]);
        more(config);
    });
}

#[test]
fn sandbox_of_a_pod_is_a_process_without_a_guest() {
    needs!(root, python3);
    let engine = Engine::new("stays");
    for kind in [
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri-o.ContainerType",
    ] {
        sandbox(&engine, kind, |_| {});
        engine.folder.file("calls", "");
        engine.create();
        let state = engine.state();
        assert_eq!(state["status"], "created");
        let pid = state["pid"].as_u64().unwrap();
        assert_eq!(engine.folder.read("pid"), pid.to_string());
        engine.works(&["start", "c1"]);
        assert_eq!(engine.state()["status"], "running");
        let calls = engine.folder.read("calls");
        assert!(
            calls.starts_with("prepare ") && calls.lines().count() == 1,
            "{calls}"
        );
        assert!(
            engine
                .works(&["ps", "--format", "json", "c1"])
                .contains(&pid.to_string())
        );
        engine.refuses(&["exec", "c1", "true"], "it has no guest");
        engine.works(&["pause", "c1"]);
        engine.works(&["kill", "c1", "WINCH"]);
        assert_eq!(engine.state()["status"], "paused");
        engine.works(&["resume", "c1"]);
        engine.refuses(&["delete", "c1"], "it is running");
        engine.works(&["kill", "c1", "TERM"]);
        engine.waits_until_it_has_ended();
        engine.works(&["delete", "c1"]);
        engine.nothing_is_left();
    }
}

#[test]
fn sandbox_whose_hook_fails_or_that_is_deleted_by_force_leaves_nothing() {
    needs!(root, python3);
    let engine = Engine::new("stays");
    let kind = "io.kubernetes.cri.container-type";
    sandbox(&engine, kind, |config| {
        config["hooks"]["createRuntime"] = json!([{ "path": "/bin/false" }]);
    });
    engine.refuses(&engine.of_bundle("create", "c1"), "/bin/false");
    engine.nothing_is_left();
    sandbox(&engine, kind, |_| {});
    engine.create();
    let pid = engine.state()["pid"].as_u64().unwrap();
    engine.works(&["delete", "--force", "c1"]);
    engine.nothing_is_left();
    common::wait_until("its process has ended", || {
        !std::path::Path::new(&format!("/proc/{pid}")).exists()
    });
}
