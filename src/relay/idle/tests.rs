//! The idle clock, on tokio's stopped time.

use super::*;
use std::future::poll_fn;
use std::task::{Waker, ready};
use tokio::time::Instant;

const PEER_TIMEOUT: Duration = Duration::from_secs(40);
const LIMIT: Duration = Duration::from_secs(1);

/// The lifetime of a session with `touches` activities, each after half of its limit.
async fn lives(clock: &IdleClock, touches: u32) -> Duration {
    let begun = Instant::now();
    let mut idle = clock.enter(Duration::from_secs(3600), 0);
    for _ in 0..touches {
        let silence = poll_fn(|cx| idle.poll_due(cx, Some(LIMIT), false));
        assert!(tokio::time::timeout(LIMIT / 2, silence).await.is_err(), "it expired although it was active");
        idle.touch();
    }
    poll_fn(|cx| idle.poll_due(cx, Some(LIMIT), false)).await;
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_session_expires_soon_after_its_limit_and_never_before() {
    let clock = IdleClock::new(LIMIT);
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = async {
            for touches in [0, 1, 5] {
                let lived = lives(&clock, touches).await;
                let least = LIMIT + LIMIT / 2 * touches;
                assert!(lived >= least && lived <= least + 3 * clock.tick, "{lived:?} after {touches}");
            }
        } => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_without_a_limit_settles_once_and_its_peers_are_checked_while_they_lack_bytes() {
    let clock = IdleClock::new(LIMIT);
    let session = async {
        let mut idle = clock.enter(Duration::from_secs(5), 0);
        let mut settled = 0;
        let mut checks = 0;
        let silence = poll_fn(|cx| {
            settled += u32::from(idle.has_just_settled(PEER_TIMEOUT));
            loop {
                let due = ready!(idle.poll_due(cx, None, false));
                if due != Due::Check {
                    return Poll::Ready(due);
                }
                checks += 1;
            }
        });
        assert!(tokio::time::timeout(Duration::from_secs(10_000), silence).await.is_err());
        assert_eq!(settled, 1);
        // Every quarter of the timeout, or a little more often.
        assert!((1_000..=2_000).contains(&checks), "{checks}");
        idle.confirm();
        let silence = poll_fn(|cx| idle.poll_due(cx, None, false));
        assert!(tokio::time::timeout(Duration::from_secs(10_000), silence).await.is_err());
        idle.touch();
        assert_eq!(poll_fn(|cx| idle.poll_due(cx, None, false)).await, Due::Check);
    };
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = session => {}
    }
}

#[tokio::test(start_paused = true)]
async fn entries_are_used_again_and_the_clock_stops_without_sessions() {
    let clock = IdleClock::new(LIMIT);
    let sessions: Vec<_> = (0..3).map(|_| clock.enter(LIMIT, 0)).collect();
    drop(sessions);
    let _session = clock.enter(LIMIT, 0);
    assert_eq!((clock.entries.borrow().len(), clock.free.borrow().len()), (3, 2));
    drop(_session);
    assert!(tokio::time::timeout(Duration::from_secs(60), clock.run()).await.is_err());
    assert!(clock.now.get() <= 2 * TICKS_WITHOUT_SESSIONS, "it ticks without sessions");
}

#[tokio::test(start_paused = true)]
async fn the_longest_silent_sessions_of_a_backend_end_first_and_young_ones_do_not() {
    let clock = IdleClock::new(LIMIT);
    let settle = Duration::from_secs(5);
    let is_over = |idle: &mut IdleHandle<'_>| {
        let mut cx = Context::from_waker(Waker::noop());
        matches!(idle.poll_due(&mut cx, None, false), Poll::Ready(Due::EndRequested))
    };
    let sessions = async {
        let mut of_other = clock.enter(settle, 7);
        let mut old: Vec<_> = (0..4).map(|_| clock.enter(settle, 8)).collect();
        for n in [2, 0, 3] {
            sleep(LIMIT).await;
            old[n].touch();
        }
        let mut young = clock.enter(settle, 8);
        let end = |most| {
            let mut found = 0;
            let left = clock.end_sessions(&[8, 9], 2 * LIMIT, settle, |n| {
                found = n;
                most
            });
            (found, left)
        };
        assert_eq!(end(1), (4, 3));
        assert_eq!(old.iter_mut().map(is_over).collect::<Vec<_>>(), [false, true, false, false]);
        assert_eq!(end(2), (3, 1));
        assert_eq!(old.iter_mut().map(is_over).collect::<Vec<_>>(), [true, true, true, false]);
        assert_eq!((end(9), end(9)), ((1, 0), (0, 0)));
        assert!(!is_over(&mut of_other) && !is_over(&mut young));
        drop(old);
        sleep(3 * LIMIT).await;
        assert_eq!(end(9), (1, 0), "it is old enough now");
        assert!(is_over(&mut young));
    };
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = sessions => {}
    }
}

#[tokio::test(start_paused = true)]
async fn memory_is_given_back_after_a_peak_although_some_of_its_sessions_go_on() {
    const PEAK: usize = 50_000;
    let clock = IdleClock::new(LIMIT);
    let poll = |idle: &mut IdleHandle<'_>| {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(idle.poll_due(&mut cx, Some(1000 * LIMIT), false).is_pending());
    };
    let sessions = async {
        let mut sessions: Vec<_> = (0..PEAK as u64).map(|key| clock.enter(1000 * LIMIT, key)).collect();
        sessions.iter_mut().for_each(poll);
        let before = clock.entries.borrow().capacity();
        let mut number = 0;
        sessions.retain(|_| {
            number += 1;
            number % 500 == 0
        });
        for _ in 0..5 {
            sleep(SHRINK_TICKS * clock.tick).await;
            sessions.iter_mut().for_each(poll);
        }
        let after = (clock.entries.borrow().capacity(), clock.free.borrow().capacity());
        assert!(before >= PEAK && after.0 <= 2048 && after.1 <= 2048, "{before}, {after:?}");
        assert!(clock.vacated.borrow().capacity() <= 2048);
        // Each handle still has the entry of its session.
        for (number, session) in (1..).zip(&sessions) {
            assert_eq!(session.entry().backend, 500 * number - 1);
        }
        drop(sessions);
        assert_eq!(clock.entries.borrow().len(), clock.free.borrow().len() + clock.vacated.borrow().len());
    };
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = sessions => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_whose_bytes_moved_on_the_wire_is_ended_after_longer_silent_ones() {
    let clock = IdleClock::new(LIMIT);
    let settle = Duration::from_secs(5);
    let is_end_requested = |idle: &mut IdleHandle<'_>| {
        let mut cx = Context::from_waker(Waker::noop());
        matches!(idle.poll_due(&mut cx, None, false), Poll::Ready(Due::EndRequested))
    };
    let sessions = async {
        let (mut slow, mut silent) = (clock.enter(settle, 8), clock.enter(settle, 8));
        sleep(LIMIT).await;
        silent.touch();
        sleep(4 * LIMIT).await;
        let end = |most| clock.end_sessions(&[8], LIMIT, settle, |_| most);
        assert_eq!(end(1), 1);
        assert!(is_end_requested(&mut slow) && !is_end_requested(&mut silent), "as far as the clock knows");
        assert!(slow.record_move(LIMIT / 2) && !slow.record_move(LIMIT / 2) && !slow.record_move(LIMIT));
        assert!(slow.defer() && !is_end_requested(&mut slow));
        // The end of another session is requested in its stead.
        assert_eq!(end(0), 1);
        assert!(is_end_requested(&mut silent) && !is_end_requested(&mut slow));
        assert_eq!(end(1), 0);
        assert!(is_end_requested(&mut slow) && !slow.defer(), "only once");
    };
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = sessions => {}
    }
}

/// Ticks are counted in 32 bits, which wrap after 1.3 years of the shortest tick.
#[tokio::test(start_paused = true)]
async fn a_clock_that_wraps_closes_no_session_early_or_late() {
    let clock = IdleClock::new(LIMIT);
    clock.now.set(Tick::MAX - 3);
    let mut settled = 0;
    let session = async {
        let mut idle = clock.enter(LIMIT / 2, 0);
        idle.confirm();
        poll_fn(|cx| {
            settled += u32::from(idle.has_just_settled(PEER_TIMEOUT));
            idle.poll_due(cx, Some(LIMIT), false)
        })
        .await;
    };
    let begun = Instant::now();
    tokio::select! {
        () = clock.run() => unreachable!("it never ends"),
        () = session => {}
    }
    let lived = begun.elapsed();
    assert!(lived >= LIMIT && lived <= LIMIT + 3 * clock.tick, "{lived:?}");
    assert!(clock.now.get() < 100, "it has not wrapped");
    assert_eq!(settled, 1);
}
