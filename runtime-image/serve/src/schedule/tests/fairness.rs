//! Who runs when, over long runs.

use super::*;

/// Requests whose tokens nobody looks at, for long runs.
struct Crowd {
    scheduler: Scheduler,
    goals: HashMap<RequestId, usize>,
    next_id: RequestId,
}

impl Crowd {
    fn new(limits: Limits) -> Self {
        Crowd {
            scheduler: Scheduler::new(limits),
            goals: HashMap::new(),
            next_id: 0,
        }
    }

    /// A request of the only user of a tenant.
    fn add(&mut self, tenant: u64, priority: i64, prompt: usize, more: usize) -> RequestId {
        self.add_of(ClientId { tenant, user: 0 }, priority, prompt, more)
    }

    fn add_of(&mut self, client: ClientId, priority: i64, prompt: usize, more: usize) -> RequestId {
        self.next_id += 1;
        let new = NewRequest {
            client,
            priority,
            // No two alike, so that nobody is served by the prefix cache.
            ..NewRequest::new(vec![self.next_id as u32; prompt], prompt + more)
        };
        self.scheduler.add(self.next_id, new).unwrap();
        self.goals.insert(self.next_id, prompt + more);
        self.next_id
    }

    fn step(&mut self) {
        let step = self.scheduler.schedule(0);
        assert!(!step.work.is_empty(), "nothing runs");
        for work in step.work {
            self.scheduler.computed(&work);
            if work.samples {
                self.scheduler.append(work.id, &[0]);
                if self.scheduler.tokens(work.id).len() >= self.goals[&work.id] {
                    self.scheduler.remove(work.id);
                    self.goals.remove(&work.id);
                }
            }
        }
    }

    /// Steps until the request has ended.
    fn steps_to_end(&mut self, id: RequestId, mut between: impl FnMut(&mut Self)) -> usize {
        let mut steps = 0;
        while self.goals.contains_key(&id) {
            assert!(steps < 100_000, "request {id} starves");
            between(self);
            self.step();
            steps += 1;
        }
        steps
    }
}

#[test]
fn a_client_with_a_hundred_requests_does_not_hold_up_one_with_one() {
    let mut crowd = Crowd::new(Limits {
        blocks: 100_000,
        ..limits()
    });
    let first = crowd.next_id + 1;
    for _ in 0..100 {
        crowd.add(1, 0, 8, 3000);
    }
    (0..500).for_each(|_| crowd.step());
    // All places are taken, and for long: one is given up once the other client is far enough behind.
    let one = crowd.add(2, 0, 8, 20);
    let steps = crowd.steps_to_end(one, |_| ());
    assert!(steps < 200, "{steps} steps");
    assert_eq!(crowd.scheduler.counts().preemptions, 1);
    assert!(crowd.scheduler.tokens(first).len() > 500, "the oldest goes on");
    // The next ones of both come in turn: whoever was served less goes first.
    let two = crowd.add(2, 0, 8, 20);
    assert!(crowd.steps_to_end(two, |_| ()) < 200);
}

#[test]
fn a_tenant_gains_nothing_by_naming_many_users_and_its_users_share_what_it_gets() {
    let mut crowd = Crowd::new(Limits {
        max_sequences: 2,
        blocks: 1000,
        ..limits()
    });
    let mut served = [0, 0];
    let mut users = 0;
    let (mut mine, mut one_user) = (Vec::new(), 0);
    for _ in 0..4000 {
        while crowd.scheduler.waiting() < 12 {
            // The first tenant names a new user for each request; the second one has two, one of whom asks nine times as often.
            users += 1;
            crowd.add_of(ClientId { tenant: 1, user: users }, 0, 4, 10);
            let user = u64::from(users % 10 == 0);
            mine.push((crowd.add_of(ClientId { tenant: 2, user }, 0, 4, 10), user));
        }
        for (id, request) in &crowd.scheduler.requests {
            let runs = !crowd.scheduler.table(*id).is_empty();
            served[request.client.tenant as usize - 1] += usize::from(runs);
        }
        crowd.step();
        one_user += mine
            .extract_if(.., |(id, _)| !crowd.goals.contains_key(id))
            .filter(|(_, user)| *user == 1)
            .count();
    }
    let share = served[0] as f64 / (served[0] + served[1]) as f64;
    assert!(
        (0.45..0.55).contains(&share),
        "the one with many users has {share} of the places"
    );
    let waits = mine.iter().filter(|(_, user)| *user == 1).count();
    assert!(
        waits <= 1 && one_user > 10,
        "who asks seldom waits for nobody: {waits} wait, {one_user} ended"
    );
}

#[test]
fn a_lower_priority_is_earlier_until_the_others_have_waited_long_enough() {
    let busy = || {
        let mut crowd = Crowd::new(Limits {
            max_sequences: 1,
            blocks: 1000,
            ..limits()
        });
        crowd.add(1, 0, 4, 10);
        crowd.step();
        crowd
    };
    for client in [1, 2] {
        let mut crowd = busy();
        let (late, early) = (crowd.add(1, 1, 4, 10), crowd.add(client, -1, 4, 10));
        crowd.steps_to_end(early, |_| ());
        assert!(crowd.goals.contains_key(&late), "client {client}");
    }
    // Two levels are 1024 tokens: after that many, what comes later with a better priority comes later.
    let mut crowd = busy();
    let late = crowd.add(1, 1, 4, 10);
    let mut others = 0;
    crowd.steps_to_end(late, |crowd| {
        if crowd.scheduler.waiting() < 2 {
            crowd.add(1, -1, 4, 10);
            others += 1;
        }
    });
    assert!(
        (1024 / 24..1024 / 24 + 5).contains(&others),
        "{others} of 24 tokens each"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn nobody_starves_whatever_the_others_do(
        (own_client, priority, prompt, more) in (0u64..2, 0i64..=3, 1usize..30, 1usize..18),
        others in prop::collection::vec((0u64..3, -3i64..=3, 1usize..30, 1usize..18), 1..20),
        max_batched_tokens in 1usize..24,
    ) {
        let mut crowd = Crowd::new(Limits { max_batched_tokens, ..limits() });
        let mut turn = 0;
        // Always as many others as the queue takes: of the same client, of another one, or of one that nobody has seen.
        let mut crowded = |crowd: &mut Crowd| {
            while crowd.goals.len() < limits().max_waiting + limits().max_sequences {
                let (client, priority, prompt, more) = others[turn % others.len()];
                let client = if client == 2 { 100 + turn as u64 } else { client };
                crowd.add(client, priority, prompt, more);
                turn += 1;
            }
        };
        for _ in 0..50 {
            crowded(&mut crowd);
            crowd.step();
        }
        let id = crowd.add(own_client, priority, prompt, more);
        crowd.steps_to_end(id, crowded);
    }
}
