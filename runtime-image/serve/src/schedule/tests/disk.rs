//! What lies on the disk, who waits for it, and what becomes of it.

use super::*;

fn with_slots(spill_slots: usize) -> Machine {
    Machine::new(Limits {
        spill_slots,
        ..limits()
    })
}

/// A prompt of `count` tokens that begins like no other.
fn prompt(which: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 1000 * which + i).collect()
}

impl Machine {
    /// A request alone, to its end.
    fn serve(&mut self, id: RequestId, prompt: Vec<u32>) {
        self.add(id, prompt, 1).unwrap();
        self.run_to_end();
    }

    /// One that takes the whole cache.
    fn sweep(&mut self, id: RequestId) {
        self.serve(id, prompt(id as u32, 46));
    }

    /// The tokens that a prompt finds in memory and on the disk.
    fn finds(&mut self, id: RequestId, prompt: Vec<u32>) -> (u64, u64) {
        let before = self.scheduler.counts();
        self.serve(id, prompt);
        let now = self.scheduler.counts();
        (now.prefix_hits - before.prefix_hits, now.disk_hits - before.disk_hits)
    }
}

#[test]
fn what_was_evicted_is_read_while_others_are_computed_and_only_the_rest_is_computed() {
    let mut machine = with_slots(40);
    machine.serve(1, prompt(1, 22));
    machine.sweep(2);
    let queries = machine.scheduler.counts().disk_queries;
    machine.add(3, prompt(1, 22), 1).unwrap();
    machine.add(4, prompt(4, 6), 3).unwrap();
    for at in [0, 6, 7] {
        let work = machine.step();
        assert_eq!(
            work.iter().map(|work| (work.id, work.start)).collect::<Vec<_>>(),
            [(4, at)]
        );
    }
    assert!(machine.scheduler.is_loading() && machine.step().is_empty());
    for _ in 0..5 {
        assert!(machine.read(true));
    }
    let work = machine.step();
    assert_eq!((work[0].id, work[0].start, work[0].count), (3, 20, 2));
    let counts = machine.scheduler.counts();
    assert_eq!((counts.disk_queries - queries, counts.disk_hits), (6 + 22, 20));
    // It is in memory now, and still on the disk: evicted once more it need not be written.
    let on_disk = machine.disk.len();
    assert_eq!(machine.finds(5, prompt(1, 22)), (20, 0));
    machine.room = 0;
    machine.sweep(6);
    assert_eq!(
        (machine.finds(7, prompt(1, 22)), machine.disk.len()),
        ((0, 20), on_disk)
    );
}

#[test]
fn what_was_used_longest_ago_falls_off_a_full_disk_the_end_of_a_prompt_first() {
    let mut machine = with_slots(16);
    // Five blocks each, and eleven of each that sweeps.
    machine.serve(1, prompt(1, 22));
    machine.sweep(2);
    machine.serve(3, prompt(3, 1));
    assert_eq!(machine.finds(4, prompt(1, 22)), (0, 20));
    machine.sweep(5);
    machine.sweep(6);
    assert!(machine.scheduler.slots_used() <= 16);
    // Eleven blocks of one, and four that were copied ahead of the other.
    assert_eq!(
        machine.finds(7, prompt(1, 22)),
        (0, 4),
        "the first of five blocks is left"
    );
    assert_eq!(machine.finds(8, prompt(2, 46)), (0, 0));
}

#[test]
fn of_more_than_there_is_room_for_the_beginning_is_kept() {
    let mut machine = with_slots(40);
    machine.room = 0;
    machine.serve(1, prompt(1, 44));
    machine.room = 3;
    machine.add(2, prompt(2, 46), 1).unwrap();
    machine.step();
    machine.room = 0;
    machine.run_to_end();
    assert_eq!(machine.finds(3, prompt(1, 44)), (0, 12));
}

#[test]
fn a_long_prompt_finds_room_as_some_blocks_are_copied_before_they_are_evicted() {
    let mut machine = with_slots(40);
    machine.room = 2;
    machine.add(1, prompt(1, 40), 8).unwrap();
    machine.run_to_end();
    machine.sweep(2);
    assert_eq!(machine.finds(3, prompt(1, 40)), (0, 36));
}

#[test]
fn what_is_damaged_is_computed_and_what_stands_before_it_is_kept() {
    let mut machine = with_slots(40);
    machine.serve(1, prompt(1, 22));
    machine.sweep(2);
    machine.add(3, prompt(1, 22), 1).unwrap();
    machine.step();
    assert!(machine.read(true) && machine.read(true) && machine.read(false));
    let work = machine.step();
    assert_eq!((work[0].id, work[0].start), (3, 8), "two blocks were read");
    machine.run_to_end();
    assert_eq!(machine.scheduler.counts().preemptions, 0);
    machine.sweep(4);
    assert_eq!(machine.finds(5, prompt(1, 22)), (0, 20), "it was written anew");
}

#[test]
fn who_goes_while_the_disk_reads_leaves_blocks_and_slots_and_what_is_read_then_goes_nowhere() {
    for read in 0..3 {
        let mut machine = with_slots(40);
        machine.serve(1, prompt(1, 22));
        machine.sweep(2);
        machine.add(3, prompt(1, 22), 1).unwrap();
        machine.step();
        for _ in 0..read {
            machine.read(true);
        }
        machine.remove(3);
        machine.check();
        assert_eq!(
            (machine.scheduler.pool.available(), machine.scheduler.pool.readers()),
            (12, 0)
        );
        while machine.read(true) {}
        assert_eq!(machine.finds(4, prompt(1, 22)), (4 * read, 20 - 4 * read));
    }
}

#[test]
fn without_the_disk_whoever_waits_for_it_computes() {
    let mut machine = with_slots(40);
    machine.serve(1, prompt(1, 22));
    machine.sweep(2);
    machine.add(3, prompt(1, 22), 1).unwrap();
    machine.step();
    machine.scheduler.close_disk();
    assert_eq!(machine.step()[0].start, 0);
    machine.run_to_end();
    machine.sweep(4);
    assert_eq!(machine.finds(5, prompt(1, 22)), (0, 0));
    assert_eq!(machine.scheduler.slots_used(), 0);
}

#[test]
fn on_the_disk_too_prompts_are_found_only_by_those_who_have_the_same_salt() {
    let mut machine = with_slots(60);
    let salted = |salt: &str| NewRequest {
        salt: salt.as_bytes().into(),
        ..NewRequest::new(prompt(1, 10), 11)
    };
    machine.take(1, salted("a")).unwrap();
    machine.run_to_end();
    machine.sweep(2);
    for (id, salt, hits) in [(3, "b", 0), (4, "", 0), (5, "a", 8)] {
        let before = machine.scheduler.counts().disk_hits;
        machine.take(id, salted(salt)).unwrap();
        machine.run_to_end();
        assert_eq!(machine.scheduler.counts().disk_hits - before, hits, "{salt}");
    }
}
