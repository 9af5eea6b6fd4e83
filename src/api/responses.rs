//! Answers of control to responses. Pure.

use serde_json::json;

use super::http::Response;
use crate::vmm::action::{Answer, Outcome};
use crate::wire::config::Reported;

/// The response that tells `answer`.
pub fn response(answer: &Answer) -> Response {
    match answer {
        Ok(Outcome::Done) => Response::empty(204),
        Ok(Outcome::Instance(instance)) => ok(instance),
        Ok(Outcome::Version(version)) => ok(&json!({ "firecracker_version": version })),
        Ok(Outcome::MachineConfig(machine)) => ok(machine),
        Ok(Outcome::VmConfig(config)) => ok(&Reported(config)),
        Ok(Outcome::Timeline(steps)) => ok(&InOrder(steps)),
        Ok(Outcome::Metrics(text)) => Response {
            content_type: "text/plain; version=0.0.4",
            ..Response::json(200, text.clone())
        },
        Err(error) => fault(400, &error.0),
    }
}

/// The response to a request whose descriptors cannot be used.
pub fn refused(why: &impl std::fmt::Display) -> Response {
    fault(400, &format!("{why}."))
}

/// The response to a request that control could not be asked, or did not answer.
pub fn no_answer(why: &str) -> Response {
    fault(503, why)
}

/// The response to a request that was refused with `status`.
pub(super) fn fault(status: u16, reason: &str) -> Response {
    Response::json(status, json!({ "fault_message": reason }).to_string())
}

fn ok(value: &impl serde::Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(body) => Response::json(200, body),
        Err(error) => fault(500, &error.to_string()),
    }
}

/// A JSON object whose members keep their order.
struct InOrder<'a>(&'a [(&'static str, Option<u64>)]);

impl serde::Serialize for InOrder<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::action::{ActionError, InstanceInfo};
    use crate::wire::config::{MachineConfig, VmConfig};

    #[test]
    fn response_when_answered_is_the_json_that_clients_know() {
        let text = |outcome| {
            let response = response(&Ok(outcome));
            (response.status, response.body.unwrap_or_default())
        };
        assert_eq!(text(Outcome::Done), (204, String::new()));
        assert_eq!(
            text(Outcome::Version("1.17.0")),
            (200, r#"{"firecracker_version":"1.17.0"}"#.into())
        );
        assert_eq!(
            text(Outcome::Instance(InstanceInfo {
                id: "i".into(),
                state: "Not started",
                vmm_version: "1",
                app_name: "m",
            }))
            .1,
            r#"{"id":"i","state":"Not started","vmm_version":"1","app_name":"m"}"#
        );
        assert_eq!(
            text(Outcome::MachineConfig(MachineConfig::default())).1,
            r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#
        );
        let config = VmConfig {
            machine_config: Some(MachineConfig::default()),
            ..VmConfig::default()
        };
        assert!(
            text(Outcome::VmConfig(Box::new(config)))
                .1
                .starts_with(r#"{"balloon":null,"drives":[],"boot-source":{"#)
        );
        assert_eq!(
            text(Outcome::Timeline(vec![("b", Some(2)), ("a", None)])).1,
            r#"{"b":2,"a":null}"#
        );
        let metrics = response(&Ok(Outcome::Metrics("a 1\n".into())));
        assert!(metrics.content_type.starts_with("text/plain"));
        let refused = response(&Err(ActionError("No.".into())));
        assert_eq!(
            (refused.status, refused.body.unwrap()),
            (400, r#"{"fault_message":"No."}"#.into())
        );
    }
}
