//! Memory of the machine around the GPU, and the age of this process.

use std::fs;

/// Bytes of this machine, or of the container if that has less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    /// Memory that processes can still allocate.
    pub free: u64,
    pub total: u64,
}

/// Memory as the system reports it, if it does.
pub fn host_memory() -> Option<HostMemory> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let (mut free, mut total) = (meminfo(&text, "MemAvailable")?, meminfo(&text, "MemTotal")?);
    let read =
        |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    if let Some(limit) = read("memory.max") {
        total = total.min(limit);
        free = free.min(limit.saturating_sub(read("memory.current").unwrap_or(0)));
    }
    Some(HostMemory { free, total })
}

/// Seconds since this process began, its libraries' start included, as far as the system tells.
pub fn process_secs() -> Option<f64> {
    let (stat, uptime) =
        (fs::read_to_string("/proc/self/stat").ok()?, fs::read_to_string("/proc/uptime").ok()?);
    // After the name in brackets, which may hold spaces: the twentieth field is in hundredths since the boot.
    let begun: f64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    Some(uptime.split(' ').next()?.parse::<f64>().ok()? - begun / 100.0)
}

/// Bytes of a line `key:   123 kB`.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_an_age() {
        let first = process_secs().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let second = process_secs().unwrap();
        assert!(first > -0.02 && second > first && second < first + 60.0, "{first} {second}");
    }

    #[test]
    fn lines_are_found_by_their_whole_key() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:    1000 kB\n";
        assert_eq!((meminfo(text, "MemAvailable"), meminfo(text, "Mem")), (Some(1_024_000), None));
    }
}
