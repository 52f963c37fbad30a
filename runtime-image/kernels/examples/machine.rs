//! What this machine gives at most: memory read and 8-bit products a second. Benchmarks say what share of it they reach.
//! `cargo run -p strata-kernels --example machine`. One JSON line.

use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

/// Far more than any cache holds.
const READ_BYTES: usize = 4 << 30;
const READS: usize = 3;
const PRODUCT_ROUNDS: usize = 3;
/// Independent sums, so that one product need not wait for the one before it.
#[cfg(target_arch = "x86_64")]
const SUMS: usize = 16;
#[cfg(target_arch = "x86_64")]
const PRODUCTS: usize = 1 << 25;

/// The shortest of `rounds` runs of `work` on `threads` threads at once, in seconds.
fn seconds(threads: usize, rounds: usize, work: impl Fn(usize) + Sync) -> f64 {
    let run = || {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let work = &work;
                scope.spawn(move || work(thread));
            }
        });
        begin.elapsed().as_secs_f64()
    };
    (0..rounds).map(|_| run()).fold(f64::INFINITY, f64::min)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni() {
    use std::arch::x86_64::{__m512i, _mm512_dpbusd_epi32, _mm512_set1_epi8};
    let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
    let mut sums: [__m512i; SUMS] = [a; SUMS];
    for _ in 0..PRODUCTS / SUMS {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

/// 10^9 products of 8-bit numbers a second with AVX512-VNNI; none where it is missing.
fn gigamacs_per_second(threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        let seconds = seconds(threads, PRODUCT_ROUNDS, |_| {
            // SAFETY: the features were just detected.
            unsafe { vnni() }
        });
        return Some((PRODUCTS * 64 * threads) as f64 / seconds / 1e9);
    }
    let _ = (threads, PRODUCT_ROUNDS);
    None
}

fn main() -> std::io::Result<()> {
    let threads = strata_kernels::pool::global().threads();
    let memory = vec![1u64; READ_BYTES / 8];
    let part = memory.len().div_ceil(threads);
    let seconds = seconds(threads, READS, |thread| {
        let part = memory.chunks(part).nth(thread).unwrap_or_default();
        // Eight sums, so that the reads wait for nothing but the memory.
        let (rows, _) = part.as_chunks::<8>();
        let sums = rows.iter().fold([0u64; 8], |mut sums, row| {
            sums.iter_mut()
                .zip(row)
                .for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            sums
        });
        black_box(sums);
    });
    let products = gigamacs_per_second(threads).map_or("null".to_owned(), |x| format!("{x:.0}"));
    writeln!(
        std::io::stdout(),
        "{{\"read_gigabytes_per_second\":{:.1},\"vnni_gigamacs_per_second\":{products},\"threads\":{threads}}}",
        READ_BYTES as f64 / seconds / 1e9
    )
}
