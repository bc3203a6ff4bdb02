//! Files from the host, and files for it.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{CopyFileRequest, GetDiagnosticDataRequest, GetDiagnosticDataResponse},
};

use super::Service;
use crate::{
    diagnostics,
    error::{During, Error, Result},
};

/// The only kind of diagnostic data.
const TERMINATION_LOG: &str = "termination_log";

/// Makes a file, a directory or a link below the share, or writes a piece of a file.
pub(super) async fn copy(service: &Service, request: CopyFileRequest) -> Result<Empty> {
    let copies = Arc::clone(&service.copies);
    service.lanes.files.bounded("copy a file", move || copies.copy(request)).await?;
    Ok(Empty::new())
}

/// Reads what a container left at its termination message path.
pub(super) async fn diagnostic_data(
    service: &Service,
    request: GetDiagnosticDataRequest,
) -> Result<GetDiagnosticDataResponse> {
    if request.log_type != TERMINATION_LOG {
        return Err(Error::Invalid(format!(
            "diagnostic data of type {:?}; there is {TERMINATION_LOG:?}",
            request.log_type
        )));
    }
    let container = service.sandbox.container(&request.container_id)?;
    let source = container.termination_log.clone().ok_or_else(|| {
        Error::State(format!(
            "container {:?} has no termination log: no mount is at the path its annotations name",
            request.container_id
        ))
    })?;
    let read = move || diagnostics::read(&source).during(|| format!("read the termination log {source:?}"));
    let data = service.lanes.files.bounded("read a termination log", read).await?;
    Ok(GetDiagnosticDataResponse { data, ..Default::default() })
}
