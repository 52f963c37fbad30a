use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits {
        max_sequences: 4,
        max_batched_tokens: 16,
        max_waiting: 8,
        block_tokens: 4,
        blocks: 12,
        prefix_caching: true,
    }
}

/// A cache that remembers what was written where, in the place of keys and values.
struct Machine {
    scheduler: Scheduler,
    written: Vec<Vec<Option<Vec<u32>>>>,
    goals: HashMap<RequestId, usize>,
    finished: Vec<(RequestId, Vec<u32>)>,
}

impl Machine {
    fn new(limits: Limits) -> Self {
        let written = vec![vec![None; limits.block_tokens]; limits.blocks];
        Machine {
            scheduler: Scheduler::new(limits),
            written,
            goals: HashMap::new(),
            finished: Vec::new(),
        }
    }

    fn add(&mut self, id: RequestId, prompt: Vec<u32>, more: usize) -> Result<(), TooLong> {
        let total = prompt.len() + more;
        self.scheduler.add(id, prompt, total)?;
        self.goals.insert(id, total);
        Ok(())
    }

    fn remove(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        self.goals.remove(&id);
    }

    /// Computes a step; the next token is a function of all tokens before it, as in a model.
    fn step(&mut self) -> Vec<Work> {
        let work = self.scheduler.schedule();
        self.check();
        assert!(work.iter().map(|piece| piece.count).sum::<usize>() <= self.scheduler.limits.max_batched_tokens);
        let size = self.scheduler.limits.block_tokens;
        for piece in &work {
            let (tokens, table) = (
                self.scheduler.tokens(piece.id).to_vec(),
                self.scheduler.table(piece.id).to_vec(),
            );
            for position in piece.start..piece.start + piece.count {
                // A place holds the whole text up to it: that is what its keys and values depend on.
                self.written[table[position / size] as usize][position % size] = Some(tokens[..=position].to_vec());
            }
            for position in 0..piece.start + piece.count {
                let seen = &self.written[table[position / size] as usize][position % size];
                assert_eq!(
                    seen.as_deref(),
                    Some(&tokens[..=position]),
                    "request {} reads what is not its own at {position}",
                    piece.id
                );
            }
        }
        for piece in &work {
            self.scheduler.computed(piece);
            if piece.samples {
                let tokens = self.scheduler.tokens(piece.id);
                let next = tokens
                    .iter()
                    .fold(7u32, |sum, token| sum.wrapping_mul(31).wrapping_add(*token))
                    % 3;
                self.scheduler.append(piece.id, next);
                if self.scheduler.tokens(piece.id).len() >= self.goals[&piece.id] {
                    self.finished.push((piece.id, self.scheduler.tokens(piece.id).to_vec()));
                    self.remove(piece.id);
                }
            }
        }
        self.check();
        work
    }

    fn check(&self) {
        self.scheduler.pool.check();
        let mut holders = vec![0; self.scheduler.limits.blocks];
        for (id, request) in &self.scheduler.requests {
            assert!(request.table.len() * self.scheduler.limits.block_tokens >= request.computed);
            let waits = self.scheduler.waiting.contains(id);
            assert!(
                waits != self.scheduler.running.contains(id),
                "request {id} is in two places or none"
            );
            assert!(!waits || request.table.is_empty(), "a waiting request holds blocks");
            for block in &request.table {
                holders[*block as usize] += 1;
            }
        }
        assert_eq!(holders, self.scheduler.pool.holders(), "blocks held and tables differ");
    }

    fn run_to_end(&mut self) {
        let mut steps = 0;
        while !self.goals.is_empty() {
            assert!(!self.step().is_empty(), "nothing runs, but requests are left");
            steps += 1;
            assert!(steps < 10_000, "no end");
        }
    }
}

#[test]
fn producing_requests_go_first_and_a_long_prompt_shares_the_step_in_chunks() {
    let mut machine = Machine::new(limits());
    machine.add(1, vec![1; 4], 20).unwrap();
    machine.step();
    machine.add(2, vec![2; 20], 2).unwrap();
    let work = |id, start, count, samples| Work {
        id,
        start,
        count,
        samples,
    };
    assert_eq!(machine.step(), [work(1, 4, 1, true), work(2, 0, 15, false)]);
    assert_eq!(machine.step(), [work(1, 5, 1, true), work(2, 15, 5, true)]);
    assert_eq!(machine.step(), [work(1, 6, 1, true), work(2, 20, 1, true)]);
}

#[test]
fn a_request_that_the_whole_cache_does_not_hold_is_refused() {
    let mut scheduler = Scheduler::new(limits());
    assert_eq!(scheduler.add(1, vec![0; 3], 49), Err(TooLong { most: 48 }));
    assert_eq!(scheduler.add(2, vec![0; 3], 48), Ok(()));
}

#[test]
fn the_newest_is_preempted_and_everything_still_ends_with_the_same_tokens() {
    let mut alone = Machine::new(limits());
    alone.add(9, vec![1, 2, 1], 30).unwrap();
    alone.run_to_end();
    let expected = alone.finished[0].1.clone();

    let mut machine = Machine::new(Limits {
        prefix_caching: false,
        ..limits()
    });
    for id in 0..4 {
        machine.add(id, vec![1, 2, 1], 30).unwrap();
    }
    machine.run_to_end();
    assert!(
        machine.scheduler.counts().preemptions > 0,
        "12 blocks cannot hold 4 × 33 tokens"
    );
    assert!(machine.finished.iter().all(|(_, tokens)| *tokens == expected));
    assert_eq!(machine.finished[0].0, 0, "the oldest is never preempted");
    assert_eq!(machine.scheduler.pool.available(), 12);
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_computes_only_the_rest() {
    let mut machine = Machine::new(limits());
    let prompt: Vec<u32> = (0..10).collect();
    machine.add(1, prompt.clone(), 1).unwrap();
    machine.run_to_end();
    machine.add(2, [&prompt[..], &[50, 51]].concat(), 1).unwrap();
    let work = machine.step();
    assert_eq!((work[0].start, work[0].count), (8, 4), "two full blocks are known");
    assert_eq!(machine.scheduler.counts().prefix_hits, 8);
    // The very same prompt still computes its last token.
    machine.add(3, prompt[..8].to_vec(), 1).unwrap();
    assert_eq!(
        (machine.step()[0].start, machine.scheduler.counts().prefix_hits),
        (4, 12)
    );
    // The same tokens after another beginning are not the same content.
    machine.add(4, [&[99; 4], &prompt[4..8], &[1]].concat(), 1).unwrap();
    assert_eq!(machine.step()[0].start, 0);
}

#[test]
fn what_a_preempted_request_finds_of_its_own_is_no_hit_of_the_prefix_cache() {
    let mut machine = Machine::new(limits());
    for id in 0..4 {
        machine.add(id, vec![10 + id as u32; 5], 28).unwrap();
    }
    machine.run_to_end();
    let counts = machine.scheduler.counts();
    assert!(counts.preemptions > 0, "12 blocks cannot hold 4 × 33 tokens");
    assert_eq!(
        (counts.prefix_queries, counts.prefix_hits),
        (4 * 5, 0),
        "four prompts of 5 tokens, no two of which begin alike"
    );
}

#[derive(Clone, Debug)]
enum Op {
    Add { prompt: Vec<u32>, more: usize },
    Cancel(usize),
    Step,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        // Few different tokens, so that prompts often begin alike.
        2 => (prop::collection::vec(0u32..2, 1..30), 1usize..18).prop_map(|(prompt, more)| Op::Add { prompt, more }),
        1 => (0usize..20).prop_map(Op::Cancel),
        6 => Just(Op::Step),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_block_is_leaked_or_shared_wrongly_over_any_sequence_of_events(
        ops in prop::collection::vec(op(), 1..120),
        prefix_caching in any::<bool>(),
        max_batched_tokens in 1usize..24,
    ) {
        let mut machine = Machine::new(Limits { prefix_caching, max_batched_tokens, ..limits() });
        for (id, op) in ops.into_iter().enumerate() {
            match op {
                Op::Add { prompt, more } => {
                    let _ = machine.add(id as RequestId, prompt, more);
                }
                Op::Cancel(nth) => {
                    let mut ids: Vec<RequestId> = machine.goals.keys().copied().collect();
                    ids.sort_unstable();
                    if let Some(id) = ids.get(nth) {
                        machine.remove(*id);
                    }
                }
                Op::Step => drop(machine.step()),
            }
            machine.check();
        }
        machine.run_to_end();
        prop_assert_eq!(machine.scheduler.pool.available(), 12);
    }
}
