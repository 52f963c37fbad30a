//! What the container may use: processors and memory, from the cgroup (v1 and v2) and the affinity mask.
//! The machine's own counts are wrong in a pod with limits.

use std::path::{Path, PathBuf};

/// How many threads can run at once: the affinity mask, cut by the cgroup's quota rounded up; at least 1.
pub fn cpu_count() -> usize {
    let affinity = affinity_count().unwrap_or(1);
    let quota = cpu_quota(&read_file).map_or(usize::MAX, |cpus| cpus.ceil().max(1.0) as usize);
    affinity.min(quota).max(1)
}

/// The cgroup's memory limit in bytes, or the machine's memory where there is no limit; `None` where neither can be read.
pub fn memory_limit_bytes() -> Option<u64> {
    let machine = machine_memory_bytes(&read_file);
    match (memory_limit(&read_file), machine) {
        (Some(limit), Some(machine)) => Some(limit.min(machine)),
        (limit, machine) => limit.or(machine),
    }
}

fn read_file(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn affinity_count() -> Option<usize> {
    // SAFETY: `set` is a plain bit mask that the call fills; its size is passed along.
    let count = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, std::mem::size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return std::thread::available_parallelism().ok().map(Into::into);
        }
        libc::CPU_COUNT(&set)
    };
    usize::try_from(count).ok().filter(|count| *count > 0)
}

type Read<'a> = &'a dyn Fn(&Path) -> Option<String>;

/// The tightest quota on the way from this process's cgroup to the root, in processors.
fn cpu_quota(read: Read) -> Option<f64> {
    let v2 = v2_folders(read).into_iter().filter_map(|folder| {
        let text = read(&folder.join("cpu.max"))?;
        let mut words = text.split_whitespace();
        ratio(words.next()?, words.next()?)
    });
    let v1 = v1_folders(read, "cpu").into_iter().filter_map(|folder| {
        ratio(
            read(&folder.join("cpu.cfs_quota_us"))?.trim(),
            read(&folder.join("cpu.cfs_period_us"))?.trim(),
        )
    });
    v2.chain(v1).min_by(f64::total_cmp)
}

fn memory_limit(read: Read) -> Option<u64> {
    let v2 = v2_folders(read)
        .into_iter()
        .filter_map(|folder| read(&folder.join("memory.max"))?.trim().parse().ok());
    let v1 = v1_folders(read, "memory")
        .into_iter()
        .filter_map(|folder| read(&folder.join("memory.limit_in_bytes"))?.trim().parse().ok());
    v2.chain(v1).min()
}

fn machine_memory_bytes(read: Read) -> Option<u64> {
    let text = read(Path::new("/proc/meminfo"))?;
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    kib.checked_mul(1024)
}

fn ratio(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.parse().ok()?; // "max" and "-1" mean that there is no quota
    let period: f64 = period.parse().ok()?;
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// The folder of `path` under `mount` and all above it up to the mount itself. A container without its own cgroup
/// namespace sees a path that does not exist under its mount: then only the mount answers.
fn folders(mount: &str, path: &str) -> Vec<PathBuf> {
    let mount = Path::new(mount);
    let relative = Path::new(path.trim_start_matches('/'));
    relative.ancestors().map(|part| mount.join(part)).collect()
}

fn v2_folders(read: Read) -> Vec<PathBuf> {
    let own = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    own.lines()
        .filter_map(|line| line.strip_prefix("0::"))
        .flat_map(|path| folders("/sys/fs/cgroup", path))
        .collect()
}

fn v1_folders(read: Read, controller: &str) -> Vec<PathBuf> {
    let own = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        if controllers.split(',').any(|name| name == controller) {
            found.extend(folders(&format!("/sys/fs/cgroup/{controller}"), path));
            found.extend(folders(&format!("/sys/fs/cgroup/{controllers}"), path));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn quota(files: &[(&str, &str)]) -> Option<f64> {
        let files: HashMap<PathBuf, String> = files
            .iter()
            .map(|(path, text)| (PathBuf::from(path), text.to_string()))
            .collect();
        cpu_quota(&|path| files.get(path).cloned())
    }

    #[test]
    fn the_tightest_quota_on_the_way_up_counts_in_both_cgroup_versions() {
        let v2 = ("/proc/self/cgroup", "0::/kubepods/pod1/c1\n");
        assert_eq!(quota(&[v2, ("/sys/fs/cgroup/cpu.max", "max 100000\n")]), None);
        assert_eq!(
            quota(&[
                v2,
                ("/sys/fs/cgroup/kubepods/pod1/c1/cpu.max", "400000 100000"),
                ("/sys/fs/cgroup/kubepods/pod1/cpu.max", "150000 100000")
            ]),
            Some(1.5)
        );
        let v1 = ("/proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n");
        assert_eq!(
            quota(&[
                v1,
                ("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "200000"),
                ("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000")
            ]),
            Some(2.0)
        );
        assert_eq!(
            quota(&[
                v1,
                ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1"),
                ("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
            ]),
            None
        );
        assert_eq!(quota(&[]), None);
    }
}
