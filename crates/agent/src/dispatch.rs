//! The server's dispatch table with one answer put right: the library says UNKNOWN to a request whose payload is no message
//! of the method's type, as if the agent had failed.

use std::collections::HashMap;

use async_trait::async_trait;
use bulkhead_protocol::status::Kind;
use ttrpc::{
    Error, Request, Response,
    r#async::{MethodHandler, Service, TtrpcContext},
};

/// How the library's errors about payloads begin.
const UNDECODABLE: &str = "Unpack request error";

/// A method that refuses what it cannot decode as invalid.
struct Strict(Box<dyn MethodHandler + Send + Sync>);

/// Makes all methods strict.
pub(crate) fn strict(mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    for service in services.values_mut() {
        let lax = std::mem::take(&mut service.methods);
        let strict =
            |(name, method)| (name, Box::new(Strict(method)) as Box<dyn MethodHandler + Send + Sync>);
        service.methods = lax.into_iter().map(strict).collect();
    }
    services
}

#[async_trait]
impl MethodHandler for Strict {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let method = request.method.clone();
        match self.0.handler(context, request).await {
            Err(Error::Others(text)) if text.starts_with(UNDECODABLE) => Ok(refusal(&method, &text)),
            other => other,
        }
    }
}

fn refusal(method: &str, text: &str) -> Response {
    let reason = text.trim_start_matches(UNDECODABLE).trim();
    let text = format!("the payload is no request of {method}: {reason}");
    let status = ttrpc::get_status(Kind::InvalidArgument.code(), text);
    Response { status: Some(status).into(), ..Default::default() }
}
