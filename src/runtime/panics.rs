//! Panics of a thread whose tasks share state.

use std::{cell::RefCell, panic, sync::Once};

thread_local! {
    static TELL: RefCell<Option<Box<dyn Fn()>>> = const { RefCell::new(None) };
}

/// Calls `tell` at every later panic of the current thread, including those that the runtime catches. Otherwise a task
/// that panics would end unnoticed.
pub fn on_panic(tell: impl Fn() + 'static) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            before(info);
            // A panic hook must not panic itself: `try_with` fails while the thread ends, `try_borrow` while `tell` is
            // being replaced.
            let _told = TELL.try_with(|tell| {
                if let Ok(tell) = tell.try_borrow()
                    && let Some(tell) = &*tell
                {
                    tell();
                }
            });
        }));
    });
    TELL.set(Some(Box::new(tell)));
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use tokio::task::{LocalSet, spawn_local};

    use super::*;

    #[tokio::test]
    async fn a_panic_that_the_runtime_catches_is_told_and_those_of_other_threads_are_not() {
        let panics = Rc::new(Cell::new(0));
        let count = Rc::clone(&panics);
        on_panic(move || count.set(count.get() + 1));
        let elsewhere = std::thread::spawn(|| panic!("on purpose"));
        assert!(elsewhere.join().is_err());
        assert_eq!(panics.get(), 0);
        LocalSet::new()
            .run_until(async {
                for so_many in 1..=2 {
                    let task = spawn_local(async { panic!("on purpose") });
                    assert!(task.await.unwrap_err().is_panic());
                    assert_eq!(panics.get(), so_many);
                }
            })
            .await;
    }
}
