//! The connections: by id for the host's events, by ports for the guest's packets, and in turn for what they have to say.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Key};

/// Host ports of connections that the host opens, above all that a program would pick.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// See the module.
#[derive(Default)]
pub(crate) struct Table {
    /// Ids are never used twice, so an event cannot reach a connection that it was not meant for.
    connections: HashMap<u64, Connection>,
    ids: HashMap<Key, u64>,
    /// Those that have something to say to the guest, each once.
    ready: VecDeque<u64>,
    ports_given: u32,
}

impl Table {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Adds one.
    pub(crate) fn insert(&mut self, id: u64, connection: Connection) {
        self.ids.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.schedule(id);
    }

    /// The one with this id.
    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    /// The id of the one that the guest means.
    pub(crate) fn find(&self, key: Key) -> Option<u64> {
        self.ids.get(&key).copied()
    }

    /// The ids of those that the guest knows of.
    pub(crate) fn known_to_guest(&self) -> Vec<u64> {
        self.connections.iter().filter(|(_, open)| open.known_to_guest()).map(|(id, _)| *id).collect()
    }

    /// Frees the ports of a connection, so that the guest can use them anew.
    pub(crate) fn free_ports(&mut self, id: u64) {
        if let Some(connection) = self.connections.get(&id)
            && self.ids.get(&connection.key) == Some(&id)
        {
            self.ids.remove(&connection.key);
        }
    }

    /// Removes one; dropping it closes its socket, which also ends its events.
    pub(crate) fn remove(&mut self, id: u64) -> Option<Connection> {
        self.free_ports(id);
        let connection = self.connections.remove(&id)?;
        if connection.scheduled {
            self.ready.retain(|ready| *ready != id);
        }
        Some(connection)
    }

    /// Removes all.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Connection> {
        std::mem::take(self).connections.into_values()
    }

    /// Puts a connection in line if it has something to say and does not stand there yet.
    pub(crate) fn schedule(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.scheduled
            && connection.has_word()
        {
            connection.scheduled = true;
            self.ready.push_back(id);
        }
    }

    /// Whether anyone stands in line.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Takes the first out of the line.
    pub(crate) fn next_ready(&mut self) -> Option<(u64, &mut Connection)> {
        let id = self.ready.pop_front()?;
        let connection = self.connections.get_mut(&id)?;
        connection.scheduled = false;
        Some((id, connection))
    }

    /// A host port that is free towards this port of the guest. There are far fewer connections than ports, so it ends.
    pub(crate) fn free_host_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = FIRST_HOST_PORT + self.ports_given;
            self.ports_given = (self.ports_given + 1) % FIRST_HOST_PORT;
            if !self.ids.contains_key(&Key { guest_port, host_port }) {
                return host_port;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::vsock::host_end::HostEnd;

    fn waiting(guest_port: u32, host_port: u32) -> Connection {
        Connection::to_guest(Key { guest_port, host_port }, HostEnd::new(UnixStream::pair().unwrap().0))
    }

    #[test]
    fn ports_in_use_are_not_given_and_the_last_is_followed_by_the_first() {
        let mut table = Table::default();
        assert_eq!(table.free_host_port(5), FIRST_HOST_PORT);
        table.ports_given = FIRST_HOST_PORT - 1;
        table.insert(1, waiting(5, 2 * FIRST_HOST_PORT - 1));
        assert_eq!(table.free_host_port(6), 2 * FIRST_HOST_PORT - 1);
        table.ports_given = FIRST_HOST_PORT - 1;
        assert_eq!(table.free_host_port(5), FIRST_HOST_PORT);
    }

    #[test]
    fn a_successor_on_the_same_ports_survives_its_predecessor() {
        let mut table = Table::default();
        table.insert(1, waiting(5, 6));
        table.free_ports(1);
        table.insert(2, waiting(5, 6));
        table.remove(1);
        assert_eq!(table.find(Key { guest_port: 5, host_port: 6 }), Some(2));
        assert_eq!(table.next_ready().map(|(id, _)| id), Some(2), "the removed one left the line");
        assert!(!table.has_ready());
    }
}
