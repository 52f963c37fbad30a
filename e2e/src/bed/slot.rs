//! A slot is a number from which everything of a bed that must not collide with another bed is derived.
//!
//! A bed lives in its own network, mount and process namespaces, so ports, sockets and iptables rules never meet.
//! What still meets on the host is one network link, three routes, one cgroup and one folder: they are named here.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::bed::cache;

/// Beds that fit side by side on one machine.
pub const SLOTS: u8 = 10;
/// Where the API server of a bed listens, on [`Slot::node_address`].
pub const API_PORT: u16 = 6443;

/// One of the beds of this machine: 0 is the demo's, 1 that of `make test`, the others are free for trials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u8);

/// The bed of `make demo`.
pub const DEMO: Slot = Slot(0);

impl Slot {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..SLOTS).map(Self)
    }

    /// The name of the node, of the link on the host and of the cgroup.
    #[must_use]
    pub fn name(self) -> String {
        format!("strata-{}", self.0)
    }

    /// Pod addresses, out of the benchmark range of RFC 2544: the private ranges collide with what machines use.
    #[must_use]
    pub fn pod_range(self) -> String {
        format!("198.18.{}.0/20", self.0 * 16)
    }

    /// Service addresses: enough for the 2,500 services of `make bench-operator`.
    #[must_use]
    pub fn service_range(self) -> String {
        format!("{}/20", self.service(0))
    }

    /// The address of the `kubernetes` Service: the first of the range, by Kubernetes' own rule.
    #[must_use]
    pub fn api_service_address(self) -> Ipv4Addr {
        self.service(1)
    }

    /// The address of the cluster's name server.
    #[must_use]
    pub fn dns_address(self) -> Ipv4Addr {
        self.service(10)
    }

    /// The host's end of the link into the bed.
    #[must_use]
    pub fn host_address(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, 255, self.0 * 4 + 1)
    }

    /// The bed's end of the link: the node's address.
    #[must_use]
    pub fn node_address(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, 255, self.0 * 4 + 2)
    }

    /// How to reach the API server from the host.
    #[must_use]
    pub fn server(self) -> String {
        format!("https://{}:{API_PORT}", self.node_address())
    }

    /// The folder that holds all files of the bed; `down` removes it.
    #[must_use]
    pub fn state(self) -> PathBuf {
        cache::root().join("bed").join(self.0.to_string())
    }

    fn service(self, offset: u8) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.0 * 16, offset)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for Slot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number) if number < SLOTS => Ok(Self(number)),
            _ => Err(format!("a slot is a number from 0 to {}, not {text:?}", SLOTS - 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a.b.c.d/n` as the half-open range of its addresses.
    fn range(cidr: &str) -> std::ops::Range<u32> {
        let (address, bits) = cidr.split_once('/').unwrap();
        let start = u32::from(address.parse::<Ipv4Addr>().unwrap());
        start..start + (1 << (32 - bits.parse::<u32>().unwrap()))
    }

    #[test]
    fn slots_share_no_address() {
        let mut ranges: Vec<_> = Slot::all()
            .flat_map(|slot| {
                let link = format!("{}/30", Ipv4Addr::from(u32::from(slot.host_address()) - 1));
                [slot.pod_range(), slot.service_range(), link]
            })
            .map(|cidr| range(&cidr))
            .collect();
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
        let benchmark = range("198.18.0.0/15");
        assert!(
            ranges
                .iter()
                .all(|range| benchmark.start <= range.start && range.end <= benchmark.end)
        );
    }

    #[test]
    fn a_slot_outside_the_range_is_refused() {
        assert_eq!("9".parse::<Slot>(), Ok(Slot(9)));
        assert!("10".parse::<Slot>().is_err());
        assert!("-1".parse::<Slot>().is_err());
    }
}
