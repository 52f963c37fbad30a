//! Caches that lag behind the server, each by as much as it likes: the end is that of a life with none.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::Value;
use strata_api::AlignmentJob;

use super::*;
use crate::engine::cache::{Cached, Object, STORES};

/// Rounds in which a life that was behind comes to its end: two attempts, and the service after them.
const SETTLING: usize = 12;

/// An operator whose caches are told what happened on the server, when a test says so.
pub struct Follower {
    pub context: Context,
    server: Arc<Server>,
    /// How much of what happened each store has been told.
    told: [usize; STORES],
}

impl Follower {
    /// One that has listed everything.
    pub fn start(server: &Arc<Server>, context: Context) -> Self {
        let mut operator = Self {
            context,
            server: server.clone(),
            told: [server.log_length(); STORES],
        };
        operator.each(|operator, store| operator.list(store));
        operator
    }

    /// Tells every cache everything.
    pub fn follow(&mut self) {
        self.follow_until(|_, end| end);
    }

    /// Tells every cache what happened up to the point that `until` chooses between the two that it is given.
    pub fn follow_until(&mut self, mut until: impl FnMut(usize, usize) -> usize) {
        let end = self.server.log_length();
        self.each(|operator, store| {
            let begin = operator.told[store.place];
            let chosen = until(begin, end);
            (store.tell)(operator, begin..chosen);
            operator.told[store.place] = chosen;
        });
    }

    fn each(&mut self, mut visit: impl FnMut(&mut Self, &Visited)) {
        for store in [
            visited::<Dataset>(),
            visited::<PretrainJob>(),
            visited::<AlignmentJob>(),
            visited::<InferenceService>(),
            visited::<Deployment>(),
            visited::<Service>(),
            visited::<Job>(),
            visited::<Pod>(),
            visited::<PodDisruptionBudget>(),
        ] {
            visit(self, &store);
        }
    }

    fn list(&mut self, store: &Visited) {
        (store.list)(self);
    }
}

/// A store, without its type.
struct Visited {
    place: usize,
    list: fn(&Follower),
    tell: fn(&Follower, std::ops::Range<usize>),
}

fn visited<K: Cached>() -> Visited {
    Visited {
        place: K::STORE,
        list: |operator| {
            let store = operator.context.caches.store::<K>();
            store.begin_list();
            for object in operator.server.all(&K::plural(&())) {
                store.list(&from_wire::<K>(&object));
            }
            store.end_list();
        },
        tell: |operator, range| {
            let store = operator.context.caches.store::<K>();
            for (is_gone, object) in operator.server.log(&K::plural(&()), range) {
                match is_gone {
                    true => store.delete(&from_wire::<K>(&object)),
                    false => store.apply(&from_wire::<K>(&object)),
                }
            }
        },
    }
}

fn from_wire<K: Cached>(object: &Value) -> Object<K> {
    serde_json::from_str(&object.to_string()).expect("any object is taken")
}

/// The Jobs that were ever made, in order.
fn made(server: &Server) -> Vec<String> {
    let mut made: Vec<String> = Vec::new();
    for (_, job) in server.log("jobs", 0..server.log_length()) {
        let name = job["metadata"]["name"].as_str().expect("a name").to_owned();
        if !made.contains(&name) {
            made.push(name);
        }
    }
    made.sort();
    made
}

/// Pseudo-random numbers, the same in every run.
struct Dice(u64);

impl Dice {
    /// A number below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % sides
    }
}

/// Lives with caches of which each is told a random part of what it does not know yet.
async fn live_behind(server: &Arc<Server>, dice: &mut Dice) {
    let mut operator = operator(server, true);
    for _ in 0..ROUNDS {
        for (kind, name) in [
            (ResourceKind::Dataset, "plays"),
            (ResourceKind::PretrainJob, "bard"),
            (ResourceKind::InferenceService, "chat"),
        ] {
            operator.follow_until(|begin, end| match dice.roll(2) {
                0 => begin,
                _ => begin + dice.roll(end - begin + 1),
            });
            if !reconcile_one(&operator.context, kind, name).await {
                operator = self::operator(server, true);
            }
        }
        if dice.roll(3) == 0 {
            server.controllers();
        }
    }
    // What is still unknown is told in the end.
    for _ in 0..SETTLING {
        if !round(&mut operator).await {
            operator = self::operator(server, true);
        }
        server.controllers();
    }
}

#[tokio::test]
async fn caches_that_lag_lead_to_the_same_end_with_the_same_jobs() {
    let good = world();
    live(&good).await;
    for seed in 0..8 {
        let server = world();
        live_behind(&server, &mut Dice(seed)).await;
        assert_eq!(made(&server), made(&good), "with seed {seed}");
        assert_eq!(server.picture(), good.picture(), "with seed {seed}");
        let before = server.writes();
        assert!(round(&mut operator(&server, true)).await);
        assert_eq!(
            server.writes(),
            before,
            "with seed {seed}: when all is done nothing is written"
        );
    }
}

#[tokio::test]
async fn a_new_operator_that_finds_all_done_asks_for_nothing() {
    let server = world();
    live(&server).await;
    let mut operator = operator(&server, true);
    let before = server.requests();
    assert!(round(&mut operator).await);
    assert_eq!(server.requests(), before);
}

#[tokio::test]
async fn a_crash_after_any_write_of_one_whose_caches_lag_ends_the_same() {
    let good = world();
    live(&good).await;
    for crash in 1..=good.writes() {
        let server = world();
        server.crash_after(crash);
        live_behind(&server, &mut Dice(crash as u64)).await;
        assert_eq!(made(&server), made(&good), "crash after write {crash}");
        assert_eq!(server.picture(), good.picture(), "crash after write {crash}");
    }
}
