//! What this processor can do: asked once, so that every kernel chooses its path at run time and one binary runs anywhere.

use std::sync::OnceLock;

/// An instruction set for which kernels have a path. Ordered: a later one includes the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust; runs everywhere and is the reference in tests.
    Portable,
    /// AVX2 with FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI on top of AVX2.
    Avx512Vnni,
    /// AMX with products of 8-bit numbers on top of that.
    Amx,
}

impl Isa {
    /// The name that logs and benchmarks print.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512Vnni => "avx512-vnni",
            Isa::Amx => "amx-int8",
        }
    }

    /// Every instruction set that this processor has, the plainest first; tests compare them with each other.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512Vnni, Isa::Amx]
            .into_iter()
            .filter(|isa| *isa <= self::isa())
            .collect()
    }
}

/// The best instruction set of this processor.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")) {
        return Isa::Portable;
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    match avx512 {
        true if may_use_amx() => Isa::Amx,
        true => Isa::Avx512Vnni,
        false => Isa::Avx2,
    }
}

/// Whether the processor has AMX's tiles and 8-bit products, and the system lets this process use them: their registers are so
/// large that a process has to ask, once for all of its threads.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_amx() -> bool {
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    let leaves = std::arch::x86_64::__cpuid(0).eax;
    let features = if leaves >= 7 {
        std::arch::x86_64::__cpuid_count(7, 0).edx
    } else {
        0
    };
    // SAFETY: it asks for a permission and touches no memory.
    let allowed = || unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0;
    features & (TILE | INT8) == TILE | INT8 && allowed()
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_amx() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}
