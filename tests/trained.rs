//! A finished run of the small recipe, for tests that need one.

use std::fs;
use std::sync::OnceLock;

use pkv_test_support::files::copy_folder;

use crate::sandbox::{Sandbox, documents};

/// A sandbox whose run is finished; made once.
pub fn trained() -> &'static Sandbox {
    static TRAINED: OnceLock<Sandbox> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let s = Sandbox::new();
        let policies = "eval.answer_policies=[\"pair\",\"pair-floor\",\"pair-uniform\",\"pair-budget\"]";
        s.run(&["run", "--set", policies]).ok();
        s.write("context.txt", documents().split('\0').next().unwrap());
        s.write("empty.txt", "");
        s
    })
}

/// A sandbox of its own with a copy of that run: for a test whose commands lock the run or write to it.
pub fn finished() -> Sandbox {
    let s = Sandbox::new();
    for name in ["context.txt", "empty.txt"] {
        fs::copy(trained().path(name), s.path(name)).unwrap();
    }
    copy_folder(&trained().path("runs"), &s.path("runs"));
    s
}
