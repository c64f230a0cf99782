//! A process of a test's own that is killed at a chosen moment.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// The variable that has the folder of such a process.
pub const FOLDER: &str = "PKV_TEST_FOLDER";

/// Run the ignored test `name` of this binary on `folder` and kill it, `delay` after `moved` holds; its
/// status if it had ended by itself.
///
/// A busy machine takes its time to start a process: the moments that count come after it has done something.
///
/// # Panics
/// The process cannot be started or killed.
pub fn kill(name: &str, folder: &Path, moved: impl Fn() -> bool, delay: Duration) -> Option<ExitStatus> {
    let mut child = Command::new(std::env::current_exe().expect("a test has a binary"))
        .args(["--exact", name, "--ignored"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("this binary can be started");
    while !moved() && child.try_wait().expect("it is a child").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(delay);
    let ended = child.try_wait().expect("it is a child");
    child.kill().expect("it is a child");
    child.wait().expect("it is a child");
    ended
}
