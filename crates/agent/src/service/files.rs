//! Files from the host, and files for it.

use bulkhead_protocol::{
    Empty,
    agent::{CopyFileRequest, GetDiagnosticDataRequest, GetDiagnosticDataResponse},
};

use super::Service;
use crate::error::{Error, Result};

/// Not built yet.
pub(super) async fn copy(_: &Service, _: CopyFileRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request CopyFile".into()))
}

/// Not built yet.
pub(super) async fn diagnostic_data(
    _: &Service,
    _: GetDiagnosticDataRequest,
) -> Result<GetDiagnosticDataResponse> {
    Err(Error::Unsupported("the request GetDiagnosticData".into()))
}
