//! Throws damaged input at what reads input, for a given time: `fuzz TARGET SECONDS FOLDER`, where a target is one of
//! `requests`, `gguf`, `folder` and `template`. Input that reaches code that none before it reached is kept in FOLDER and
//! damaged further, if the crates were compiled with counters (`make fuzz` does); without them it starts from the seeds
//! alone. A panic, an answer with status 500 and an input that takes too long end the run with status 1; the input stays in
//! FOLDER/current, also when the process is killed by it.

mod cover;
mod mutate;
mod targets;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mutate::Mutator;
use targets::Target;

/// Longer than the costliest input that is within all bounds.
const TOO_LONG_SECONDS: u64 = 20;
/// Inputs that are kept; the ones found last are the deepest.
const MAX_KEPT: usize = 4000;

/// Seconds since the start at which the current input began.
static BEGAN: AtomicU64 = AtomicU64::new(0);

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, seconds, folder] = arguments.as_slice() else {
        return Err("give a target, seconds, and a folder".into());
    };
    let (folder, time) = (Path::new(folder), Duration::from_secs(seconds.parse()?));
    std::fs::create_dir_all(folder)?;
    let current = folder.join("current");
    let mut target = Target::new(name, folder)?;
    let mut kept = target.seeds()?;
    kept.extend(earlier(folder)?);
    let mut mutator = Mutator::new(std::process::id().into(), target.words());
    let begin = Instant::now();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let ran = begin.elapsed().as_secs().saturating_sub(BEGAN.load(Ordering::Relaxed));
            if ran > TOO_LONG_SECONDS {
                tell("the input in FOLDER/current takes too long");
                std::process::exit(1);
            }
        }
    });
    // The message of a panic comes once, with the input that made it.
    let (mut runs, mut found, seeds) = (0u64, 0u64, kept.len());
    let mut seen = cover::Seen::default();
    while begin.elapsed() < time {
        let input = match kept.get(runs as usize) {
            Some(input) if (runs as usize) < seeds => input.clone(),
            _ => mutator.next(&kept),
        };
        std::fs::write(&current, &input)?;
        BEGAN.store(begin.elapsed().as_secs(), Ordering::Relaxed);
        cover::reset();
        let outcome = catch_unwind(AssertUnwindSafe(|| target.run(&input)));
        runs += 1;
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("{name}: {error}; the input is {}", current.display()).into()),
            Err(_) => return Err(format!("{name}: a panic; the input is {}", current.display()).into()),
        }
        if seen.is_new() && runs as usize > seeds {
            found += 1;
            std::fs::write(folder.join(format!("{:016x}", mutate::hash(&input))), &input)?;
            if kept.len() >= MAX_KEPT {
                kept.remove(seeds);
            }
            kept.push(input);
        }
    }
    std::fs::remove_file(&current)?;
    tell(&format!(
        "{{\"target\":\"{name}\",\"inputs\":{runs},\"new_paths\":{found},\"kept\":{},\"counters\":{},\"reached\":{}}}",
        kept.len(),
        cover::counters(),
        seen.reached()
    ));
    Ok(())
}

fn tell(text: &str) {
    // Nobody reads it: nothing is lost.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// What earlier runs found, the latest names last.
fn earlier(folder: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let mut inputs = Vec::new();
    for entry in std::fs::read_dir(folder)?.take(MAX_KEPT) {
        let entry = entry?;
        let is_input = entry.file_name().to_string_lossy().len() == 16;
        if is_input && entry.file_type()?.is_file() {
            inputs.push(std::fs::read(entry.path())?);
        }
    }
    Ok(inputs)
}
