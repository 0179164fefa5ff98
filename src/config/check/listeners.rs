//! `listeners` and `admin`: the addresses that Statera listens on. Each may be used once.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{named_section, secret_file, tcp_congestion};
use crate::config::decode::{Field, Keys, Kind, Section};
use crate::config::{Admin, Listener};

const LISTENER: Keys = Keys {
    now: &["bind", "pool", "tcp_congestion"],
    later: &[
        "max_connections",
        "max_connections_per_ip",
        "connection_rate_per_ip",
        "allow",
        "deny",
        "proxy_protocol",
    ],
    example: "{bind: \"0.0.0.0:8080\", pool: web}",
    meant: &[],
};
pub(super) const ADMIN: Keys = Keys {
    now: &["bind", "token_file"],
    later: &[],
    example: "{bind: \"127.0.0.1:9901\"}",
    meant: &[(Kind::Text, "bind")],
};
const ADMIN_PORT: u16 = 9901;
/// How many pools a message lists.
const POOLS_LISTED: usize = 10;

/// The listeners, and their addresses, which the admin server must not use.
pub(super) struct Listeners {
    pub(super) listeners: Vec<Listener>,
    taken: Taken,
}

pub(super) fn listeners(root: &Section<'_>) -> Listeners {
    let mut taken = Taken::default();
    let Some(section) = named_section(
        root,
        "listeners",
        LISTENER,
        "web: {bind: \"0.0.0.0:8080\", pool: web}",
        "write at least one listener",
    ) else {
        return Listeners { listeners: Vec::new(), taken };
    };
    let pools = pool_names(root);
    let listeners = section.entries().map(|(name, field)| {
        let listener = Section::open(field, LISTENER);
        Listener {
            name: name.into(),
            bind: bind(&listener, &mut taken),
            pool: pool(&listener, &pools).into(),
            tcp_congestion: tcp_congestion(&listener),
        }
    });
    Listeners { listeners: listeners.collect(), taken }
}

fn bind(listener: &Section<'_>, taken: &mut Taken) -> Vec<SocketAddr> {
    if !listener.has("bind") && listener.whole().is_map() {
        listener.whole().miss("bind", "it is missing: write the address to listen on, like \"0.0.0.0:8080\"");
    }
    let Some(field) = listener.field("bind") else { return Vec::new() };
    let fields = field.one_or_many();
    if fields.is_empty() {
        field.refuse_unshown("the list is empty: write at least one address");
    }
    let cure = "an IP address and a port are needed, like \"0.0.0.0:8080\" or \"[::]:8080\"";
    let addresses = fields.iter().filter_map(|field| {
        let address = unmapped(field.parsed::<SocketAddr>(cure)?, field)?;
        taken.take(address, field);
        Some(address)
    });
    addresses.collect()
}

/// Refuses an IPv4 address in IPv6 notation. The kernel refuses it, too, since Statera's IPv6 sockets do
/// not take IPv4 connections (`[::]` and 0.0.0.0 can be used together).
fn unmapped(address: SocketAddr, field: &Field<'_>) -> Option<SocketAddr> {
    let canonical = address.ip().to_canonical();
    if canonical != address.ip() {
        let canonical = SocketAddr::new(canonical, address.port());
        field.refuse(format_args!("an IPv4 address in IPv6 notation: write \"{canonical}\""));
        return None;
    }
    Some(address)
}

/// Returns the names of all pools. A pool with mistakes is among them, since a listener may still name it.
fn pool_names<'a>(root: &Section<'a>) -> Vec<&'a str> {
    let Some(field) = root.field("pools").filter(Field::is_map) else { return Vec::new() };
    field.keys().collect()
}

fn pool<'a>(listener: &Section<'a>, pools: &[&str]) -> &'a str {
    if !listener.has("pool") && listener.whole().is_map() {
        listener.whole().miss("pool", "it is missing: name the pool that serves it");
    }
    let Some(field) = listener.field("pool") else { return "" };
    let Some(name) = field.text() else { return "" };
    // Where there are no pools at all, that is reported already.
    if !pools.is_empty() && !pools.contains(&name) {
        let listed: Vec<&str> = pools.iter().copied().take(POOLS_LISTED).collect();
        let more = if pools.len() > POOLS_LISTED { ", …" } else { "" };
        let listed = crate::config::decode::escaped(&listed.join(", "), 200);
        field.refuse(format_args!("there is no such pool: the pools are {listed}{more}"));
    }
    name
}

impl Listeners {
    /// Reads the `admin` section. `None` only where a problem was reported.
    pub(super) fn admin(&self, section: &Section<'_>) -> Option<Admin> {
        let bind = match section.field("bind") {
            Some(field) => self.admin_bind(&field),
            None => Some(SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN_PORT))),
        };
        let token = section.field("token_file").and_then(|field| secret_file::read(&field));
        let bind = bind?;
        if !bind.ip().is_loopback() && !section.has("token_file") {
            let cure = "others can reach this address: write token_file beside it, or use 127.0.0.1";
            section.field("bind").inspect(|field| field.refuse(cure));
        }
        Some(Admin { bind, token })
    }

    fn admin_bind(&self, field: &Field<'_>) -> Option<SocketAddr> {
        if field.text_contains("unix:") {
            field.refuse("a unix socket is not supported yet: write an address, like \"127.0.0.1:9901\"");
            return None;
        }
        let address =
            field.parsed::<SocketAddr>("an IP address and a port are needed, like \"127.0.0.1:9901\"")?;
        let address = unmapped(address, field)?;
        self.taken.refuse_clash(address, field);
        Some(address)
    }
}

/// The addresses in use, each with the path of the key that uses it. A lookup takes constant time.
#[derive(Default)]
struct Taken {
    exact: HashMap<SocketAddr, String>,
    /// 0.0.0.0 and `[::]`, which use the port on every address of their family. Listeners set
    /// IPV6_V6ONLY, so `[::]` does not use IPv4.
    wildcards: HashMap<(bool, u16), String>,
    /// The first address of each family on each port.
    ports: HashMap<(bool, u16), String>,
}

impl Taken {
    fn take(&mut self, address: SocketAddr, field: &Field<'_>) {
        self.refuse_clash(address, field);
        let (key, path) = (family_and_port(address), field.path());
        self.exact.entry(address).or_insert_with(|| path.to_owned());
        self.ports.entry(key).or_insert_with(|| path.to_owned());
        if address.ip().is_unspecified() {
            self.wildcards.entry(key).or_insert_with(|| path.to_owned());
        }
    }

    fn refuse_clash(&self, address: SocketAddr, field: &Field<'_>) {
        // Port 0 asks for any free port.
        if address.port() == 0 {
            return;
        }
        let key = family_and_port(address);
        let anywhere = self.ports.get(&key).filter(|_| address.ip().is_unspecified());
        if let Some(other) = self.exact.get(&address).or_else(|| self.wildcards.get(&key)).or(anywhere) {
            field.refuse(format_args!("{other} listens there already: choose another address or port"));
        }
    }
}

fn family_and_port(address: SocketAddr) -> (bool, u16) {
    (matches!(address.ip(), IpAddr::V4(_)), address.port())
}
