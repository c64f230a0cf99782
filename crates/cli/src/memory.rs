//! The system's allocator. Where it refuses memory, the program ends with an error, a hint and the exit code
//! of the environment; Rust's own answer is signal 6. What was written before is whole, as after a kill.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Cursor, Write};

use pkv_core::FailureKind;

#[global_allocator]
static ALLOCATOR: OrEnd = OrEnd;

struct OrEnd;

// SAFETY: all memory is the system allocator's; a null pointer is not returned but ends the process.
unsafe impl GlobalAlloc for OrEnd {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on, here and below.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        given(unsafe { System.realloc(at, layout, size) }, size)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

fn given(at: *mut u8, bytes: usize) -> *mut u8 {
    if at.is_null() {
        end(bytes)
    }
    at
}

/// Nothing here allocates, and no destructor runs.
#[cold]
fn end(bytes: usize) -> ! {
    let mut text = Cursor::new([0u8; 512]);
    // It has room.
    let _ = write!(
        text,
        "error: memory ran out: {bytes} bytes more were refused; what was written before is whole\n\nhint: see what else \
         uses memory (`free -h`, `ulimit -v`) and what each stage needs (`proxykv-train plan`), then run the same command \
         again\n"
    );
    let length = text.position() as usize;
    // SAFETY: the buffer has `length` bytes; the process ends here.
    unsafe {
        libc::write(2, text.get_ref().as_ptr().cast(), length);
        libc::_exit(FailureKind::Environment.exit_code().into())
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::hint::black_box;
    use std::process::Command;

    use super::*;

    /// The second process asks for more than any machine has.
    #[test]
    fn refused_memory_is_an_error_with_a_hint() {
        const ASKS: &str = "PKV_TEST_ASKS_FOR_MEMORY";
        if env::var_os(ASKS).is_some() {
            black_box(Vec::<u8>::with_capacity(1 << 46));
            return;
        }
        let second = Command::new(env::current_exe().unwrap())
            .args(["--exact", "memory::tests::refused_memory_is_an_error_with_a_hint", "--nocapture"])
            .env(ASKS, "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&second.stderr);
        assert_eq!(second.status.code(), Some(FailureKind::Environment.exit_code().into()), "{stderr}");
        assert!(stderr.contains("70368744177664 bytes") && stderr.contains("hint:"), "{stderr}");
    }
}
