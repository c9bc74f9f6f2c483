//! An allocator that counts what each thread has, and fails at its n-th request.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;

thread_local! {
    static LIVE_BYTES: Cell<usize> = const { Cell::new(0) };
    /// Counts down; the request that meets 1 fails, and all after it.
    static FAIL_AT: Cell<usize> = const { Cell::new(usize::MAX) };
}

struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

// SAFETY: everything is the system's allocator, or null, which is an allocator's way to fail. The
// counters neither allocate nor have destructors, so they can be used here at any time.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let left = FAIL_AT.get();
        if left == 1 {
            return ptr::null_mut();
        }
        if left != usize::MAX {
            FAIL_AT.set(left - 1);
        }
        LIVE_BYTES.set(LIVE_BYTES.get().wrapping_add(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE_BYTES.set(LIVE_BYTES.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Runs it with an allocator that has no memory from the n-th request on.
pub(crate) fn failing_at<T>(step: usize, run: impl FnOnce() -> T) -> T {
    FAIL_AT.set(step);
    let result = run();
    FAIL_AT.set(usize::MAX);
    result
}

/// What this thread has allocated and not freed. Memory that goes from thread to thread confuses it.
pub(crate) fn live_bytes() -> usize {
    LIVE_BYTES.get()
}
