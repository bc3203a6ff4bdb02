//! What is done to every request before its method: it is held against the policy, in its wire form; and one answer is put
//! right: the library says UNKNOWN to a request whose payload is no message of the method's type, as if the agent had failed.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use bulkhead_protocol::{layout::Message as Layout, status::Kind};
use ttrpc::{
    Error, Request, Response,
    r#async::{MethodHandler, Service, TtrpcContext},
};

use crate::policy::Policy;

/// How the library's errors about payloads begin.
const UNDECODABLE: &str = "Unpack request error";

/// Whose requests are held against the policy.
const JUDGED: &str = "grpc.AgentService";

/// A method that refuses what it cannot decode as invalid, and first of all what the policy denies.
struct Strict {
    method: Box<dyn MethodHandler + Send + Sync>,
    judge: Option<Judge>,
}

/// The policy, and the name it knows the method's request by.
struct Judge {
    policy: Arc<Policy>,
    request: &'static str,
}

/// Makes all methods strict.
pub(crate) fn strict(
    mut services: HashMap<String, Service>,
    policy: &Arc<Policy>,
) -> HashMap<String, Service> {
    for (service, Service { methods, .. }) in &mut services {
        let strict = |(name, method): (String, Box<dyn MethodHandler + Send + Sync>)| {
            let request = Layout::of_method(&name).map(Layout::name).filter(|_| service == JUDGED);
            let judge = request.map(|request| Judge { policy: Arc::clone(policy), request });
            (name, Box::new(Strict { method, judge }) as Box<dyn MethodHandler + Send + Sync>)
        };
        *methods = std::mem::take(methods).into_iter().map(strict).collect();
    }
    services
}

#[async_trait]
impl MethodHandler for Strict {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        if let Some(judge) = &self.judge
            && let Err(denial) = judge.policy.check(judge.request, &request.payload)
        {
            return Ok(answer(denial.kind(), denial.to_string()));
        }
        let method = request.method.clone();
        match self.method.handler(context, request).await {
            Err(Error::Others(text)) if text.starts_with(UNDECODABLE) => Ok(refusal(&method, &text)),
            other => other,
        }
    }
}

fn refusal(method: &str, text: &str) -> Response {
    let reason = text.trim_start_matches(UNDECODABLE).trim();
    let text = format!("the payload is no request of {method}: {reason}");
    answer(Kind::InvalidArgument, text)
}

fn answer(kind: Kind, text: String) -> Response {
    let status = ttrpc::get_status(kind.code(), text);
    Response { status: Some(status).into(), ..Default::default() }
}
