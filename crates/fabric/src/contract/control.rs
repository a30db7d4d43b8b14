//! Messages between hosts.

use super::{World, on_all_ranks};
use epsmoe_base::{Layer, Mix, Place, env::test_seed};
use epsmoe_device::Backend;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Everybody hears everybody, in rank order.
pub fn messages<B: Backend>(world: &World<'_, B>) {
    let seed = test_seed();
    for size in 1..=world.most {
        let message = move |rank: usize, round: u64| -> Vec<u8> {
            let mut mix = Mix::keyed(seed, &[rank as u64, round]);
            (0..mix.below(50)).map(|_| mix.below(256) as u8).collect()
        };
        on_all_ranks(world.patient(size, seed), move |node| {
            let mut delay = Mix::keyed(seed, &[99, node.rank() as u64]);
            for round in 0..30 {
                std::thread::sleep(Duration::from_micros(delay.below(300) as u64));
                let place = Place::layer(Layer(0));
                let heard = node.fabric.control.exchange("news", place, message(node.rank(), round));
                let want: Vec<_> = (0..size).map(|rank| message(rank, round)).collect();
                assert_eq!(heard, Ok(want), "round {round}, {size} ranks, seed {seed}");
            }
        });
    }
}

/// Nobody passes a barrier before all have come.
pub fn barriers<B: Backend>(world: &World<'_, B>) {
    let seed = test_seed();
    for size in 1..=world.most {
        let come = Arc::new(AtomicUsize::new(0));
        on_all_ranks(world.patient(size, seed), move |node| {
            let mut delay = Mix::keyed(seed, &[node.rank() as u64]);
            for round in 1..=20 {
                std::thread::sleep(Duration::from_micros(delay.below(300) as u64));
                come.fetch_add(1, Ordering::SeqCst);
                node.fabric.control.barrier(Place::default()).expect("all come");
                let come = come.load(Ordering::SeqCst);
                assert!(come >= round * size, "{come} of {size} ranks in round {round}, seed {seed}");
            }
        });
    }
}
