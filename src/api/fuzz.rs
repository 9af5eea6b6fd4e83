//! Bodies of requests: any operation of the table, with any bytes.

use super::http::Request;
use super::routes;
use crate::fuzz::Input;
use crate::wire::{OPERATIONS, config};

/// A request of one of the operations, with a body that is the rest of the input. Checked: it is an
/// action or refused with a reason in JSON; a whole configuration that is taken can be written and
/// read again.
pub fn api(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let operation = input.one_of(OPERATIONS);
    let id = input.one_of(&["root", "net1", "", "a b", "\u{e9}", "x/y"]);
    let body = input.bytes(usize::MAX);
    let request = Request {
        method: operation.method,
        path: operation.path.replace("{id}", id),
        body: (!body.is_empty()).then(|| body.to_vec()),
        close: false,
    };
    match routes::action(&request) {
        Ok(action) => {
            let _ = routes::deprecated(&action);
            let _ = routes::patience(&action);
        }
        Err(refused) => {
            assert_eq!(refused.status, 400);
            let text = refused.body.unwrap();
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(
                value["fault_message"]
                    .as_str()
                    .is_some_and(|it| !it.is_empty())
            );
        }
    }
    let _ = config::parse_vm(body);
}
