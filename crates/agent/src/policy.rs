//! What the host may ask for: an allow-list that every request is held against. Without one everything is allowed.

use bulkhead_protocol::protobuf::Message;

use crate::error::{Error, Result};

/// The policy in force.
#[derive(Default)]
pub(crate) struct Policy {}

impl Policy {
    /// Whether a request, named after its message, is allowed; [`Error::Denied`] when not.
    pub(crate) fn check(&self, _name: &str, _request: &impl Message) -> Result<()> {
        Ok(())
    }

    /// Replaces the policy, if the one in force allows that.
    pub(crate) fn replace(&self, _text: &str) -> Result<()> {
        Err(Error::Unsupported("the request SetPolicy".into()))
    }
}
