//! Who runs next: clients share what is computed, priorities move a request in time, and nobody waits for ever.
//!
//! As in Sheng and others, "Fairness in Serving Large Language Models" (2024), each client has a counter of the tokens that
//! it was served, and the one with the lowest runs next. A client that had nothing waiting begins at the floor, so that
//! nobody saves up. A level of priority is worth [`LEVEL_TOKENS`]: that many tokens less or more on the counter between
//! clients, and that many tokens served to anybody earlier or later among a client's own requests.
//!
//! Nobody starves: the floor rises with all that is served, divided by the clients that are there, so whoever comes later
//! sooner or later comes at a higher count, whatever its priority; and of a client's own requests, only finitely many can
//! stand before one.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use super::RequestId;

/// Names a client; whoever gives no name is the client 0.
pub type ClientId = u64;

/// Priorities that differ; lower is earlier.
pub const PRIORITIES: RangeInclusive<i64> = -100..=100;
/// What a level of priority is worth, in tokens.
const LEVEL_TOKENS: u64 = 512;
/// What a generated token counts for; one of a prompt counts for 1.
pub(super) const TOKEN_COST: u64 = 2;
/// How far ahead of a waiting client another one must be to lose a place to it, in tokens: it pays by computing again.
const AHEAD_TOKENS: u64 = 1024;
/// Counters are kept in parts of a token, since the floor rises by fractions.
const UNIT: u64 = 1 << 20;
/// Clients remembered that have no request.
const MAX_IDLE: usize = 1024;

/// Where a request stands among those of its client, and who loses its blocks last. It never changes, so that the first one
/// always gets on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Order {
    /// Tokens served when it arrived, moved by its priority.
    tag: u64,
    pub(super) id: RequestId,
}

impl Order {
    /// The order of another choice of the same request.
    pub(super) fn of(self, id: RequestId) -> Self {
        Order { id, ..self }
    }
}

#[derive(Debug, Default)]
struct Client {
    /// What it was served, in units.
    served: u64,
    /// Waiting requests, and what their priority adds to the counter.
    waiting: BTreeMap<Order, u64>,
    /// Places that its running requests take.
    places: usize,
    /// Requests that wait or run.
    requests: usize,
}

/// All clients.
#[derive(Debug, Default)]
pub(super) struct Clients {
    known: HashMap<ClientId, Client>,
    /// Clients that have requests.
    active: usize,
    /// Where a client begins, in units.
    floor: u64,
    /// Tokens served to anybody.
    served: u64,
}

/// What a priority adds to a counter, in tokens.
fn offset(priority: i64) -> u64 {
    (priority - PRIORITIES.start()).unsigned_abs() * LEVEL_TOKENS
}

impl Clients {
    /// A new request waits.
    pub(super) fn arrive(&mut self, client: ClientId, priority: i64, id: RequestId) -> Order {
        let waiting = self.known.values().filter(|client| !client.waiting.is_empty());
        self.floor = self.floor.max(waiting.map(|client| client.served).min().unwrap_or(0));
        let order = Order {
            tag: self.served + offset(priority),
            id,
        };
        let known = self.known.entry(client).or_default();
        if known.waiting.is_empty() {
            known.served = known.served.max(self.floor);
        }
        self.active += usize::from(known.requests == 0);
        known.requests += 1;
        self.wait(client, priority, order);
        order
    }

    fn client(&mut self, client: ClientId) -> &mut Client {
        self.known
            .get_mut(&client)
            .expect("the client of a request is known until the request has left")
    }

    pub(super) fn wait(&mut self, client: ClientId, priority: i64, order: Order) {
        self.client(client).waiting.insert(order, offset(priority) * UNIT);
    }

    /// It does not wait any more.
    pub(super) fn withdraw(&mut self, client: ClientId, order: Order) {
        self.client(client).waiting.remove(&order);
    }

    pub(super) fn started(&mut self, client: ClientId, places: usize) {
        self.client(client).places += places;
    }

    pub(super) fn stopped(&mut self, client: ClientId, places: usize) {
        self.client(client).places -= places;
    }

    /// A running request became two, which together take as many places.
    pub(super) fn forked(&mut self, client: ClientId) {
        self.client(client).requests += 1;
    }

    /// A request has ended.
    pub(super) fn left(&mut self, client: ClientId) {
        let known = self.client(client);
        known.requests -= 1;
        self.active -= usize::from(known.requests == 0);
        if self.known.len() - self.active > MAX_IDLE {
            // Whoever is below the floor would begin there anyway.
            let floor = self.floor;
            self.known
                .retain(|_, client| client.requests > 0 || client.served > floor);
            if self.known.len() - self.active > MAX_IDLE {
                self.known.retain(|_, client| client.requests > 0);
            }
        }
    }

    /// A client was served.
    pub(super) fn charge(&mut self, client: ClientId, tokens: u64) {
        self.client(client).served += tokens * UNIT;
        self.served += tokens;
        self.floor += tokens * UNIT / self.active.max(1) as u64;
    }

    /// The request that runs next.
    pub(super) fn next(&self) -> Option<Order> {
        let first = |client: &Client| {
            let (order, offset) = client.waiting.first_key_value()?;
            Some((client.served + offset, *order))
        };
        self.known.values().filter_map(first).min().map(|(_, order)| order)
    }

    /// The request that must make way for `next`: the last one of a client that has several places more and was served much
    /// more. `last` gives a client's last running request and its priority.
    pub(super) fn ahead_of(&self, next: &Order, last: impl Fn(ClientId) -> Option<(Order, i64)>) -> Option<RequestId> {
        let waiting = self.known.values().find_map(|client| {
            let offset = client.waiting.get(next)?;
            Some((client.served + offset, client.places))
        });
        let (count, places) = waiting?;
        let victim = |(id, client): (&ClientId, &Client)| {
            if client.places < places + 2 {
                return None;
            }
            let (order, priority) = last(*id)?;
            let ahead = client.served + offset(priority) * UNIT;
            (ahead >= count + AHEAD_TOKENS * UNIT).then_some((ahead, order))
        };
        self.known.iter().filter_map(victim).max().map(|(_, order)| order.id)
    }

    #[cfg(test)]
    pub(super) fn waits(&self, client: ClientId, order: Order) -> bool {
        self.known[&client].waiting.contains_key(&order)
    }

    #[cfg(test)]
    pub(super) fn check(&self, requests: &HashMap<RequestId, super::Request>) {
        let active = self.known.values().filter(|client| client.requests > 0).count();
        assert_eq!(self.active, active);
        for (id, client) in &self.known {
            let own: Vec<_> = requests.values().filter(|request| request.client == *id).collect();
            assert_eq!(own.len(), client.requests);
            let waiting = own.iter().filter(|request| client.waiting.contains_key(&request.order));
            assert_eq!(waiting.clone().count(), client.waiting.len());
            let places: usize = own.iter().map(|request| request.width).sum();
            assert_eq!(
                client.places,
                places - waiting.map(|request| request.width).sum::<usize>()
            );
        }
    }
}
