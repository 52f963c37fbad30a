//! Who runs next: clients share what is computed, priorities move a request in time, and nobody waits for ever.
//!
//! As in Sheng and others, "Fairness in Serving Large Language Models" (2024), each client has a counter of the tokens that
//! it was served, and the one with the lowest runs next. A client that had nothing waiting begins at the floor, so that
//! nobody saves up. A level of priority is worth [`LEVEL_TOKENS`]: that many tokens less or more on the counter between
//! clients, and that many tokens served to anybody earlier or later among a client's own requests.
//!
//! This holds on two levels: tenants, who are told apart by their keys, share what is computed; and what a tenant gets, its
//! users share, whom it names itself. So a tenant gains nothing by naming more of them.
//!
//! Nobody starves: the floor rises with all that is served, divided by those that are there, so whoever comes later
//! sooner or later comes at a higher count, whatever its priority; and of a client's own requests, only finitely many can
//! stand before one.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use super::RequestId;

/// Names a client. Whoever gives no key is of the tenant 0, and without a name the user 0 of its tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ClientId {
    /// Whose key it presented.
    pub tenant: u64,
    /// Whom the tenant says that it asks for.
    pub user: u64,
}

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
/// Users of a tenant, and tenants, remembered that have no request.
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

/// Somebody who shares with others.
#[derive(Debug, Default)]
struct Member<T> {
    /// What it was served, in units.
    served: u64,
    /// Waiting requests.
    waiting: usize,
    /// Places that its running requests take.
    places: usize,
    /// Requests that wait or run.
    requests: usize,
    /// What is shared further.
    inner: T,
}

/// Those who share.
#[derive(Debug, Default)]
struct Level<T> {
    known: HashMap<u64, Member<T>>,
    /// Members that have requests.
    active: usize,
    /// Where a member begins, in units.
    floor: u64,
}

/// Waiting requests of a user, and what their priority adds to the counter.
type Waiting = BTreeMap<Order, u64>;
type Users = Level<Waiting>;

/// All clients.
#[derive(Debug, Default)]
pub(super) struct Clients {
    tenants: Level<Users>,
    /// Tokens served to anybody.
    served: u64,
}

/// What a priority adds to a counter, in tokens.
fn offset(priority: i64) -> u64 {
    (priority - PRIORITIES.start()).unsigned_abs() * LEVEL_TOKENS
}

impl<T: Default> Level<T> {
    /// A new request of a member waits.
    fn arrive(&mut self, id: u64) -> &mut T {
        let waiting = self.known.values().filter(|member| member.waiting > 0);
        self.floor = self.floor.max(waiting.map(|member| member.served).min().unwrap_or(0));
        let member = self.known.entry(id).or_default();
        if member.waiting == 0 {
            member.served = member.served.max(self.floor);
        }
        self.active += usize::from(member.requests == 0);
        member.requests += 1;
        &mut member.inner
    }

    fn member(&mut self, id: u64) -> &mut Member<T> {
        self.known
            .get_mut(&id)
            .expect("whose request it is is known until the request has left")
    }

    /// A request has ended.
    fn left(&mut self, id: u64) {
        let member = self.member(id);
        member.requests -= 1;
        self.active -= usize::from(member.requests == 0);
        if self.known.len() - self.active > MAX_IDLE {
            // Whoever is below the floor would begin there anyway.
            let floor = self.floor;
            self.known
                .retain(|_, member| member.requests > 0 || member.served > floor);
            if self.known.len() - self.active > MAX_IDLE {
                self.known.retain(|_, member| member.requests > 0);
            }
        }
    }

    /// A member was served.
    fn charge(&mut self, id: u64, tokens: u64) -> &mut T {
        self.floor += tokens * UNIT / self.active.max(1) as u64;
        let member = self.member(id);
        member.served += tokens * UNIT;
        &mut member.inner
    }

    /// The request that runs next, and what its priority adds, given the next one of each member.
    fn next(&self, of: impl Fn(&T) -> Option<(u64, Order)>) -> Option<(u64, Order)> {
        let first = |member: &Member<T>| {
            let (offset, order) = of(&member.inner).filter(|_| member.waiting > 0)?;
            Some((member.served + offset, order, offset))
        };
        let next = self.known.values().filter_map(first).min();
        next.map(|(_, order, offset)| (offset, order))
    }

    /// The request that must make way for one of `id` whose priority adds `offset`: the last one of a member that has several
    /// places more and was served much more. `last` gives a member's last running request and its priority.
    fn ahead_of(&self, id: u64, offset: u64, last: impl Fn(u64) -> Option<(Order, i64)>) -> Option<RequestId> {
        let waits = self.known.get(&id)?;
        let count = waits.served + offset;
        let victim = |(id, member): (&u64, &Member<T>)| {
            if member.places < waits.places + 2 {
                return None;
            }
            let (order, priority) = last(*id)?;
            let ahead = member.served + self::offset(priority) * UNIT;
            (ahead >= count + AHEAD_TOKENS * UNIT).then_some((ahead, order))
        };
        self.known.iter().filter_map(victim).max().map(|(_, order)| order.id)
    }
}

impl Clients {
    /// A new request waits.
    pub(super) fn arrive(&mut self, client: ClientId, priority: i64, id: RequestId) -> Order {
        let order = Order {
            tag: self.served + offset(priority),
            id,
        };
        self.tenants.arrive(client.tenant).arrive(client.user);
        self.wait(client, priority, order);
        order
    }

    /// Changes what is known of a client, on both levels alike; the client's waiting requests.
    fn change(&mut self, client: ClientId, mut change: impl FnMut(&mut usize, &mut usize, &mut usize)) -> &mut Waiting {
        let tenant = self.tenants.member(client.tenant);
        change(&mut tenant.waiting, &mut tenant.places, &mut tenant.requests);
        let user = tenant.inner.member(client.user);
        change(&mut user.waiting, &mut user.places, &mut user.requests);
        &mut user.inner
    }

    pub(super) fn wait(&mut self, client: ClientId, priority: i64, order: Order) {
        let waiting = self.change(client, |waiting, _, _| *waiting += 1);
        waiting.insert(order, offset(priority) * UNIT);
    }

    /// It does not wait any more.
    pub(super) fn withdraw(&mut self, client: ClientId, order: Order) {
        self.change(client, |waiting, _, _| *waiting -= 1).remove(&order);
    }

    pub(super) fn started(&mut self, client: ClientId, new: usize) {
        self.change(client, |_, places, _| *places += new);
    }

    pub(super) fn stopped(&mut self, client: ClientId, old: usize) {
        self.change(client, |_, places, _| *places -= old);
    }

    /// A running request became two, which together take as many places.
    pub(super) fn forked(&mut self, client: ClientId) {
        self.change(client, |_, _, requests| *requests += 1);
    }

    /// A request has ended.
    pub(super) fn left(&mut self, client: ClientId) {
        self.tenants.member(client.tenant).inner.left(client.user);
        self.tenants.left(client.tenant);
    }

    /// A client was served.
    pub(super) fn charge(&mut self, client: ClientId, tokens: u64) {
        self.tenants.charge(client.tenant, tokens).charge(client.user, tokens);
        self.served += tokens;
    }

    /// The request that runs next.
    pub(super) fn next(&self) -> Option<Order> {
        let of_user = |waiting: &Waiting| waiting.first_key_value().map(|(order, offset)| (*offset, *order));
        let next = self.tenants.next(|users| users.next(of_user));
        next.map(|(_, order)| order)
    }

    /// The request that must make way for `next` of `client`: of another tenant, or else of another user of its own. `last`
    /// gives the last running request of those that it is asked for, and its priority.
    pub(super) fn ahead_of(
        &self,
        next: &Order,
        client: ClientId,
        last: impl Fn(&dyn Fn(ClientId) -> bool) -> Option<(Order, i64)>,
    ) -> Option<RequestId> {
        let users = &self.tenants.known.get(&client.tenant)?.inner;
        let offset = *users.known.get(&client.user)?.inner.get(next)?;
        let of_tenant = |id| last(&|other| other.tenant == id);
        let of_user = |id| last(&|other| other.tenant == client.tenant && other.user == id);
        let victim = self.tenants.ahead_of(client.tenant, offset, of_tenant);
        victim.or_else(|| users.ahead_of(client.user, offset, of_user))
    }

    #[cfg(test)]
    pub(super) fn waits(&self, client: ClientId, order: Order) -> bool {
        let users = &self.tenants.known[&client.tenant].inner;
        users.known[&client.user].inner.contains_key(&order)
    }

    #[cfg(test)]
    pub(super) fn check(&self, requests: &HashMap<RequestId, super::Request>) {
        fn check<T>(
            level: &Level<T>,
            waits: &impl Fn(&super::Request) -> bool,
            of: &impl Fn(u64) -> Vec<super::Request>,
        ) {
            let active = level.known.values().filter(|member| member.requests > 0).count();
            assert_eq!(level.active, active);
            for (id, member) in &level.known {
                let own = of(*id);
                assert_eq!(own.len(), member.requests);
                let waiting = own.iter().filter(|request| waits(request));
                assert_eq!(waiting.clone().count(), member.waiting);
                let places: usize = own.iter().map(|request| request.width).sum();
                assert_eq!(
                    member.places,
                    places - waiting.map(|request| request.width).sum::<usize>()
                );
            }
        }
        let waits = |request: &super::Request| self.waits(request.client, request.order);
        let of = |wanted: &dyn Fn(ClientId) -> bool| -> Vec<super::Request> {
            requests
                .values()
                .filter(|request| wanted(request.client))
                .cloned()
                .collect()
        };
        check(&self.tenants, &waits, &|tenant| of(&|client| client.tenant == tenant));
        for (tenant, member) in &self.tenants.known {
            check(&member.inner, &waits, &|user| {
                of(&|client| client == ClientId { tenant: *tenant, user })
            });
        }
    }
}
