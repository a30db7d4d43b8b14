//! Pieces of work that threads draw one after the other.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Builder;

/// Hardware threads that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Does pieces `0..pieces` on up to `threads` threads, this one among them, and gives what came of them in order. Each thread
/// takes the next piece when it is done with one. After an error nothing new is begun; of several errors, that of the
/// first piece is told, which does not depend on the threads.
pub fn by_threads<T: Send, E: Send>(
    threads: usize,
    pieces: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let draw = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                break;
            }
            let outcome = work(piece);
            failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
            done.push((piece, outcome));
        }
        done
    };
    let mut done = std::thread::scope(|scope| {
        // Where the system gives no more threads, those there are do it all.
        let start = |_| Builder::new().spawn_scoped(scope, draw).ok();
        let others: Vec<_> = (1..threads.min(pieces)).map_while(start).collect();
        let mut done = draw();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_by_key(|(piece, _)| *piece);
    done.into_iter().map(|(_, outcome)| outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once_and_told_in_order() {
        for threads in [0, 1, 3, 100] {
            let squares = by_threads(threads, 50, |piece| Ok::<_, ()>(piece * piece));
            assert_eq!(squares, Ok((0..50).map(|piece| piece * piece).collect()));
            assert_eq!(by_threads(threads, 0, Err::<(), usize>), Ok(vec![]));
        }
    }

    #[test]
    fn the_first_error_is_told() {
        for threads in [1, 4] {
            let fails = |piece| if [17, 18, 40].contains(&piece) { Err(piece) } else { Ok(piece) };
            assert_eq!(by_threads(threads, 50, fails), Err(17));
        }
    }
}
