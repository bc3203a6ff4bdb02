//! The guest's network: interfaces, routes, neighbours, packet filter.

use bulkhead_protocol::{
    Empty,
    agent::{
        AddARPNeighborsRequest, GetIPTablesRequest, GetIPTablesResponse, Interfaces, ListInterfacesRequest,
        ListRoutesRequest, Routes, SetIPTablesRequest, SetIPTablesResponse, UpdateInterfaceRequest,
        UpdateRoutesRequest,
    },
    types::Interface,
};

use super::Service;
use crate::error::{Error, Result};

/// Not built yet.
pub(super) async fn add_neighbours(_: &Service, _: AddARPNeighborsRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request AddARPNeighbors".into()))
}

/// Not built yet.
pub(super) async fn ip_tables(_: &Service, _: GetIPTablesRequest) -> Result<GetIPTablesResponse> {
    Err(Error::Unsupported("the request GetIPTables".into()))
}

/// Not built yet.
pub(super) async fn interfaces(_: &Service, _: ListInterfacesRequest) -> Result<Interfaces> {
    Err(Error::Unsupported("the request ListInterfaces".into()))
}

/// Not built yet.
pub(super) async fn routes(_: &Service, _: ListRoutesRequest) -> Result<Routes> {
    Err(Error::Unsupported("the request ListRoutes".into()))
}

/// Not built yet.
pub(super) async fn set_ip_tables(_: &Service, _: SetIPTablesRequest) -> Result<SetIPTablesResponse> {
    Err(Error::Unsupported("the request SetIPTables".into()))
}

/// Not built yet.
pub(super) async fn update_interface(_: &Service, _: UpdateInterfaceRequest) -> Result<Interface> {
    Err(Error::Unsupported("the request UpdateInterface".into()))
}

/// Not built yet.
pub(super) async fn update_routes(_: &Service, _: UpdateRoutesRequest) -> Result<Routes> {
    Err(Error::Unsupported("the request UpdateRoutes".into()))
}
