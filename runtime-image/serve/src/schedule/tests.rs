mod disk;
mod fairness;

use std::collections::{HashMap, HashSet, VecDeque};

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
        spill_slots: 0,
    }
}

/// The next token is a function of all tokens before it, as in a model, and of the choice, as of a seed.
fn next(tokens: &[u32], choice: usize) -> u32 {
    tokens.iter().fold(7 + choice as u32, |sum, token| {
        sum.wrapping_mul(31).wrapping_add(*token)
    }) % 3
}

/// What the keys and values of a place depend on: the salt must not differ, the text cannot.
type Written = (Arc<[u8]>, Vec<u32>);

struct Goal {
    new: NewRequest,
    choice: usize,
}

/// A cache that remembers what was written where, in the place of keys and values.
struct Machine {
    scheduler: Scheduler,
    written: Vec<Vec<Option<Written>>>,
    goals: HashMap<RequestId, Goal>,
    /// Requests that were not forked yet.
    whole: HashSet<RequestId>,
    finished: Vec<(RequestId, Vec<u32>)>,
    copies: usize,
    accepted: usize,
    /// What a step may copy to the disk.
    room: usize,
    /// What lies there: a content's name, and the place's texts.
    disk: HashMap<u32, (u64, Vec<Option<Written>>)>,
    /// What is to be read from it, in this order.
    reads: VecDeque<Load>,
}

impl Machine {
    fn new(limits: Limits) -> Self {
        let written = vec![vec![None; limits.block_tokens]; limits.blocks];
        Machine {
            scheduler: Scheduler::new(limits),
            written,
            goals: HashMap::new(),
            whole: HashSet::new(),
            finished: Vec::new(),
            copies: 0,
            accepted: 0,
            room: 100,
            disk: HashMap::new(),
            reads: VecDeque::new(),
        }
    }

    fn add(&mut self, id: RequestId, prompt: Vec<u32>, more: usize) -> Result<(), TooLong> {
        let total = prompt.len() + more;
        self.take(id, NewRequest::new(prompt, total))
    }

    fn take(&mut self, id: RequestId, new: NewRequest) -> Result<(), TooLong> {
        self.scheduler.add(id, new.clone())?;
        self.goals.insert(id, Goal { new, choice: 0 });
        self.whole.insert(id);
        Ok(())
    }

    fn remove(&mut self, id: RequestId) {
        self.scheduler.remove(id);
        self.goals.remove(&id);
    }

    /// A guess at what comes next, the more wrong the longer.
    fn draft(&self, piece: &Work) -> Vec<u32> {
        let mut tokens = self.scheduler.tokens(piece.id).to_vec();
        let known = tokens.len();
        for i in 0..piece.drafts {
            let right = next(&tokens, self.goals[&piece.id].choice);
            tokens.push(if (known + i) % 5 < 3 { right } else { right + 1 });
        }
        tokens.split_off(known)
    }

    /// Computes a step.
    fn step(&mut self) -> Vec<Work> {
        let Step {
            spills,
            loads,
            copies,
            work,
        } = self.scheduler.schedule(self.room);
        self.check();
        assert!(spills.len() <= self.room);
        for spill in spills {
            let content = self.written[spill.block as usize].clone();
            assert!(content.iter().all(Option::is_some), "a block that is not full");
            self.disk.insert(spill.slot, (spill.content, content));
        }
        self.reads.extend(loads);
        let computed: usize = work.iter().map(|piece| piece.count + piece.drafts).sum();
        assert!(computed <= self.scheduler.limits.max_batched_tokens);
        let size = self.scheduler.limits.block_tokens;
        for (from, to) in copies {
            self.written[to as usize] = self.written[from as usize].clone();
            self.copies += 1;
        }
        let texts: Vec<Vec<u32>> = work
            .iter()
            .map(|piece| {
                let known = &self.scheduler.tokens(piece.id)[..piece.start + piece.count];
                [known, &self.draft(piece)].concat()
            })
            .collect();
        let place = |scheduler: &Scheduler, id, position: usize| {
            let block = scheduler.table(id)[position / size];
            (block as usize, position % size)
        };
        for (piece, text) in work.iter().zip(&texts) {
            for position in piece.start..text.len() {
                let (block, slot) = place(&self.scheduler, piece.id, position);
                // A place holds the whole text up to it: that is what its keys and values depend on.
                let salt = self.goals[&piece.id].new.salt.clone();
                self.written[block][slot] = Some((salt, text[..=position].to_vec()));
            }
        }
        for (piece, text) in work.iter().zip(&texts) {
            for position in 0..text.len() {
                let (block, slot) = place(&self.scheduler, piece.id, position);
                let salt = self.goals[&piece.id].new.salt.clone();
                assert_eq!(
                    self.written[block][slot],
                    Some((salt, text[..=position].to_vec())),
                    "request {} reads what is not its own at {position}",
                    piece.id
                );
            }
        }
        for (piece, text) in work.iter().zip(&texts) {
            self.scheduler.computed(piece);
            if !piece.samples {
                continue;
            }
            let mut ids = vec![piece.id];
            if self.whole.remove(&piece.id) {
                let new = self.goals[&piece.id].new.clone();
                for choice in 1..new.choices {
                    let id = piece.id + 1000 * choice as u64;
                    self.scheduler.fork(piece.id, id);
                    let new = new.clone();
                    self.goals.insert(id, Goal { new, choice });
                    ids.push(id);
                }
            }
            for id in ids {
                self.sample(id, &text[piece.start + piece.count..]);
            }
        }
        self.check();
        work
    }

    /// The disk has read the next slot, or it is damaged. False if nothing was to be read.
    fn read(&mut self, is_whole: bool) -> bool {
        let Some(load) = self.reads.pop_front() else {
            return false;
        };
        let is_wanted = self.scheduler.is_wanted(&load);
        if self.scheduler.loaded(&load, is_whole) {
            let (content, texts) = &self.disk[&load.slot];
            assert_eq!(*content, load.content, "somebody waits for what was overwritten");
            self.written[load.block as usize] = texts.clone();
        } else {
            assert!(!is_whole || !is_wanted);
        }
        self.check();
        true
    }

    /// Appends as many of the drafts as are right, and one token.
    fn sample(&mut self, id: RequestId, drafts: &[u32]) {
        let goal = &self.goals[&id];
        let mut tokens = self.scheduler.tokens(id).to_vec();
        let known = tokens.len();
        for draft in drafts.iter().map(Some).chain([None]) {
            let token = next(&tokens, goal.choice);
            tokens.push(token);
            if draft != Some(&token) {
                break;
            }
            self.accepted += 1;
        }
        self.scheduler.append(id, &tokens[known..]);
        if tokens.len() >= goal.new.max_total {
            let mut alone = goal.new.prompt.clone();
            while alone.len() < goal.new.max_total {
                alone.push(next(&alone, goal.choice));
            }
            assert_eq!(tokens, alone, "what is scheduled decides what is said");
            self.finished.push((id, tokens));
            self.remove(id);
        }
    }

    fn check(&self) {
        let scheduler = &self.scheduler;
        scheduler.pool.check();
        let mut holders = vec![0; scheduler.limits.blocks];
        let mut places = 0;
        for (id, request) in &scheduler.requests {
            assert!(request.table.len() * scheduler.limits.block_tokens >= request.computed);
            let runs = scheduler.running.contains(&request.order);
            assert!(
                runs != scheduler.clients.waits(request.client, request.order),
                "request {id} is in two places or none"
            );
            assert!(runs || request.table.is_empty(), "a waiting request holds blocks");
            places += if runs { request.width } else { 0 };
            for block in &request.table {
                holders[*block as usize] += 1;
            }
        }
        assert!(scheduler.running.is_sorted());
        assert_eq!(places, scheduler.places);
        assert!(places <= scheduler.limits.max_sequences);
        assert_eq!(holders, scheduler.pool.holders(), "blocks held and tables differ");
        scheduler.clients.check(&scheduler.requests);
        let loading = scheduler
            .requests
            .values()
            .filter_map(|request| request.loading.as_ref());
        let slots: usize = loading.map(|loading| loading.slots.len()).sum();
        assert_eq!(
            slots,
            scheduler.pool.readers() as usize,
            "slots held and requests differ"
        );
    }

    fn run_to_end(&mut self) {
        let mut steps = 0;
        while !self.goals.is_empty() {
            let is_read = self.read(true);
            assert!(
                !self.step().is_empty() || is_read || self.scheduler.is_loading(),
                "nothing runs, but requests are left"
            );
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
        drafts: 0,
    };
    assert_eq!(machine.step(), [work(1, 4, 1, true), work(2, 0, 15, false)]);
    assert_eq!(machine.step(), [work(1, 5, 1, true), work(2, 15, 5, true)]);
    assert_eq!(machine.step(), [work(1, 6, 1, true), work(2, 20, 1, true)]);
}

#[test]
fn a_request_that_the_whole_cache_does_not_hold_is_refused() {
    let mut scheduler = Scheduler::new(limits());
    let new = |total| NewRequest::new(vec![0; 3], total);
    assert_eq!(scheduler.add(1, new(49)), Err(TooLong { most: 48 }));
    assert_eq!(scheduler.add(2, new(48)), Ok(()));
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

#[test]
fn choices_compute_their_prompt_once_and_copy_only_the_block_that_they_write_to() {
    for prefix_caching in [false, true] {
        let mut machine = Machine::new(Limits {
            prefix_caching,
            ..limits()
        });
        let new = NewRequest {
            choices: 3,
            ..NewRequest::new(vec![1; 10], 13)
        };
        machine.take(1, new).unwrap();
        assert_eq!(machine.step()[0].count, 10);
        assert_eq!(machine.scheduler.running(), 3);
        assert_eq!(machine.scheduler.pool.available(), 12 - 3, "all blocks are shared");
        let work = machine.step();
        assert_eq!(work.iter().map(|piece| piece.count).collect::<Vec<_>>(), [1, 1, 1]);
        assert_eq!(machine.copies, 2, "one of the three keeps the block");
        assert_eq!(machine.scheduler.pool.available(), 12 - 5);
        machine.run_to_end();
        assert_eq!(machine.finished.len(), 3);
        assert_eq!(machine.scheduler.pool.available(), 12);
    }
}

#[test]
fn prompts_are_found_only_by_those_who_have_the_same_salt() {
    let mut machine = Machine::new(limits());
    let salted = |salt: &str| NewRequest {
        salt: salt.as_bytes().into(),
        ..NewRequest::new(vec![1; 10], 11)
    };
    for (id, salt, start) in [(1, "", 0), (2, "a", 0), (3, "b", 0), (4, "a", 8), (5, "", 8)] {
        machine.take(id, salted(salt)).unwrap();
        assert_eq!(machine.step()[0].start, start, "{id} {salt}");
    }
}

#[test]
fn drafts_take_what_a_step_has_left_and_never_a_block_of_another() {
    let mut machine = Machine::new(Limits {
        blocks: 5,
        max_batched_tokens: 6,
        ..limits()
    });
    let new = |prompt, total| NewRequest {
        drafts: 8,
        ..NewRequest::new(prompt, total)
    };
    machine.take(1, new(vec![1; 3], 12)).unwrap();
    machine.step();
    machine.take(2, new(vec![2; 4], 8)).unwrap();
    // One token, a prompt of four, and one draft.
    let work = machine.step();
    assert_eq!(work.iter().map(|piece| piece.drafts).collect::<Vec<_>>(), [1, 0]);
    machine.run_to_end();
    assert_eq!(
        machine.scheduler.counts().preemptions,
        0,
        "12 and 8 tokens fit 5 blocks"
    );
    assert!(machine.accepted > 0);
}

#[derive(Clone, Debug)]
enum Op {
    Add(NewRequest),
    Cancel(usize),
    Step,
    Read(bool),
    CloseDisk,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        // Few different tokens, so that prompts often begin alike.
        2 => (prop::collection::vec(0u32..2, 1..30), 1usize..18, 1usize..4, 0u8..2, 0u64..3, -2i64..3, 0usize..4).prop_map(
            |(prompt, more, choices, salt, client, priority, drafts)| {
                let max_total = prompt.len() + more;
                let salt = Arc::from([salt]);
                let client = ClientId { tenant: client % 2, user: client };
                Op::Add(NewRequest { prompt, max_total, choices, salt, client, priority, drafts, whole_prompt: drafts == 3 })
            },
        ),
        1 => (0usize..20).prop_map(Op::Cancel),
        6 => Just(Op::Step),
        4 => (0u8..8).prop_map(|nth| Op::Read(nth > 0)),
        1 => (0u8..10).prop_map(|nth| if nth == 0 { Op::CloseDisk } else { Op::Step }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_block_is_leaked_or_shared_wrongly_and_no_token_changed_over_any_sequence_of_events(
        ops in prop::collection::vec(op(), 1..120),
        prefix_caching in any::<bool>(),
        max_batched_tokens in 1usize..24,
        spill_slots in 0usize..16,
        room in 0usize..6,
    ) {
        let mut machine = Machine::new(Limits { prefix_caching, max_batched_tokens, spill_slots, ..limits() });
        machine.room = room;
        for (id, op) in ops.into_iter().enumerate() {
            match op {
                Op::Add(new) => {
                    let _ = machine.take(id as RequestId, new);
                }
                Op::Cancel(nth) => {
                    let mut ids: Vec<RequestId> = machine.goals.keys().copied().collect();
                    ids.sort_unstable();
                    if let Some(id) = ids.get(nth) {
                        machine.whole.remove(id);
                        machine.remove(*id);
                    }
                }
                Op::Step => drop(machine.step()),
                Op::Read(is_whole) => drop(machine.read(is_whole)),
                Op::CloseDisk => machine.scheduler.close_disk(),
            }
            machine.check();
        }
        machine.run_to_end();
        prop_assert_eq!(machine.scheduler.pool.available(), 12);
        prop_assert_eq!(machine.scheduler.pool.readers(), 0);
    }
}
