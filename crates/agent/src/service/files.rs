//! Files from the host, and files for it.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{CopyFileRequest, GetDiagnosticDataRequest, GetDiagnosticDataResponse},
};

use super::Service;
use crate::{
    error::{Error, Result},
    sync::blocking,
};

/// Makes a file, a directory or a link below the share, or writes a piece of a file.
pub(super) async fn copy(service: &Service, request: CopyFileRequest) -> Result<Empty> {
    let copies = Arc::clone(&service.copies);
    blocking(move || copies.copy(request)).await?;
    Ok(Empty::new())
}

/// Not built yet.
pub(super) async fn diagnostic_data(
    _: &Service,
    _: GetDiagnosticDataRequest,
) -> Result<GetDiagnosticDataResponse> {
    Err(Error::Unsupported("the request GetDiagnosticData".into()))
}
