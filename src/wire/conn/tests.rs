use std::{collections::BTreeSet, mem::size_of, net::SocketAddr};

use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    task::{LocalSet, spawn_local},
};

use super::*;
use crate::wire::{close_frame, ping_frame, pong_frame, text_frame};

/// Time limit of each test: it detects a hang, and measures nothing.
const DEADLINE: Duration = Duration::from_secs(60);

fn on_shard<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new()
        .block_on(&runtime, async {
            tokio::time::timeout(DEADLINE, test).await
        })
        .expect("the test hangs")
}

fn settings(outbox_bytes: usize) -> Rc<ConnSettings> {
    Rc::new(ConnSettings {
        outbox_bytes,
        stall: Duration::from_secs(30),
        close_frame: |close| close_frame(close.code(), close.reason()),
    })
}

/// A connection and its peer. The socket buffers are as small as the kernel allows, so that a few KiB block.
async fn pair(settings: Rc<ConnSettings>) -> (Rc<Conn>, TcpStream) {
    let listener = TcpSocket::new_v4().unwrap();
    // Accepted sockets inherit this.
    listener.set_send_buffer_size(1).unwrap();
    listener
        .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .unwrap();
    let listener = listener.listen(1).unwrap();
    let peer = TcpSocket::new_v4().unwrap();
    peer.set_recv_buffer_size(1).unwrap();
    let (peer, accepted) = tokio::join!(
        peer.connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    let (stream, _) = accepted.unwrap();
    stream.set_nodelay(true).unwrap();
    // A socket does not count as writable until the runtime has seen it. Without this, the first write would not be
    // attempted.
    stream.writable().await.unwrap();
    (Conn::new(stream, settings), peer.unwrap())
}

/// `n`, padded with zeros up to `length`.
fn numbered(n: usize, length: usize) -> String {
    let n = n.to_string();
    "0".repeat(length.saturating_sub(n.len())) + &n
}

fn frame(n: usize, length: usize) -> Bytes {
    text_frame(numbered(n, length).as_bytes())
}

/// Sends numbered frames until one is queued. Returns their number.
fn fill(conn: &Rc<Conn>, length: usize) -> usize {
    let mut n = 0;
    while conn.queued_bytes() == 0 {
        assert!(n < 1_000_000, "the socket never blocks");
        conn.send(&[frame(n, length)]);
        n += 1;
    }
    n
}

/// What a peer has read: texts, and perhaps a close code at the end.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    texts: Vec<String>,
    close: Option<u16>,
    /// Bytes of an incomplete last frame.
    torn: usize,
}

/// Parses a server's bytes without any code of the crate. Panics if they are not frames.
fn parse(mut bytes: &[u8]) -> Seen {
    let mut seen = Seen {
        texts: Vec::new(),
        close: None,
        torn: 0,
    };
    while !bytes.is_empty() {
        assert_eq!(seen.close, None, "bytes after the close frame");
        let (length, at) = match bytes {
            [_, short @ 0..=125, ..] => (usize::from(*short), 2),
            [_, 126, high, low, ..] => (usize::from(u16::from_be_bytes([*high, *low])), 4),
            [_, 127, rest @ ..] if rest.len() >= 8 => {
                let length = u64::from_be_bytes(rest[..8].try_into().unwrap());
                (usize::try_from(length).unwrap(), 10)
            }
            _ => (usize::MAX, 0),
        };
        let Some(payload) = bytes.get(at..).and_then(|rest| rest.get(..length)) else {
            seen.torn = bytes.len();
            break;
        };
        match bytes[0] {
            0x81 => seen
                .texts
                .push(String::from_utf8(payload.to_vec()).unwrap()),
            0x88 => seen.close = Some(u16::from_be_bytes([payload[0], payload[1]])),
            0x89 | 0x8A => {}
            first => panic!("no frame: {first:#x}"),
        }
        bytes = &bytes[at + length..];
    }
    seen
}

/// Everything until the end, and whether the end was orderly.
async fn read_all(peer: &mut TcpStream) -> (Seen, bool) {
    let mut bytes = Vec::new();
    let orderly = peer.read_to_end(&mut bytes).await.is_ok();
    (parse(&bytes), orderly)
}

#[track_caller]
fn assert_numbered(seen: &Seen, length: usize) {
    for (n, text) in seen.texts.iter().enumerate() {
        assert_eq!(*text, numbered(n, length));
    }
    assert_eq!(seen.torn, 0, "torn frame");
}

async fn yield_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE / 2;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::task::yield_now().await;
    }
}

#[test]
fn idle_connection_is_small() {
    println!(
        "Conn {} bytes (TcpStream {}), Outbox {} bytes",
        size_of::<Conn>(),
        size_of::<TcpStream>(),
        size_of::<Outbox>()
    );
    assert!(size_of::<Conn>() <= 160);
}

#[test]
fn direct_writes_leave_no_queue_and_no_task() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        conn.send(&[]);
        conn.send(&[frame(0, 10)]);
        conn.send(&[frame(1, 10), frame(2, 10), ping_frame(), Bytes::new()]);
        assert_eq!(conn.queued_bytes(), 0);
        assert!(conn.outbox.borrow().is_none());
        assert_eq!((Rc::strong_count(&conn), Rc::weak_count(&conn)), (1, 0));
        drop(conn);
        let (seen, orderly) = read_all(&mut peer).await;
        assert!(orderly);
        assert_eq!(seen.texts.len(), 3);
        assert_numbered(&seen, 10);
    });
}

#[test]
fn many_frames_complete_in_order_through_the_queue() {
    for (count, length) in [(64, 200), (65, 200), (129, 10), (1500, 100), (3, 100_000)] {
        on_shard(async {
            let (conn, mut peer) = pair(settings(1 << 20)).await;
            let frames: Vec<Bytes> = (0..count).map(|n| frame(n, length)).collect();
            let (first, second) = frames.split_at(count / 2);
            conn.send(first);
            conn.send(second);
            let read = spawn_local(async move { read_all(&mut peer).await });
            conn.drained(0).await;
            assert_eq!(conn.closing(), None);
            assert!(conn.outbox.borrow().is_none());
            yield_until("the writer ends", || Rc::weak_count(&conn) == 0).await;
            assert_eq!(Rc::strong_count(&conn), 1);
            // It works again after having been behind.
            conn.send(&[frame(count, length)]);
            conn.close(Close::Normal);
            let (seen, orderly) = read.await.unwrap();
            assert!(orderly);
            assert_eq!((seen.texts.len(), seen.close), (count + 1, Some(1000)));
            assert_numbered(&seen, length);
            conn.closed().await;
        });
    }
}

/// First frames of different lengths shift the point at which the socket is full over every byte of the later frames.
/// The peer reads in pieces of different sizes.
#[test]
fn torn_at_every_byte_the_stream_stays_whole() {
    const LENGTH: usize = 61;
    let mut tears = BTreeSet::new();
    let cases = (0..LENGTH + 2).flat_map(|n| [(n, Close::Draining), (n, Close::TooSlow)]);
    for (shift, reason) in cases {
        let at = on_shard(async {
            let (conn, mut peer) = pair(settings(1 << 20)).await;
            let shifted = text_frame(&vec![b'0'; shift]);
            // In one vectored write: the kernel takes a separate small write either whole or not at all.
            let batch: Vec<Bytes> = std::iter::once(shifted.clone())
                .chain((0..1000).map(|n| frame(n, LENGTH)))
                .collect();
            conn.send(&batch);
            let (at, torn) = {
                let outbox = conn.outbox.borrow();
                let outbox = outbox.as_ref().expect("the socket blocks");
                (LENGTH + 2 - outbox.frames[0].len(), outbox.torn)
            };
            assert_eq!(torn, at != 0);
            let begun = batch.len() - conn.outbox.borrow().as_ref().unwrap().frames.len()
                + usize::from(torn);
            // One reason sends all of the queue, the other only the rest of the torn frame.
            conn.close(reason);
            let expected = match reason {
                Close::Draining => batch.len() - 1,
                _ => begun - 1,
            };
            let mut bytes = Vec::new();
            let mut piece = vec![0; shift + 1];
            loop {
                match peer.read(&mut piece).await.unwrap() {
                    0 => break,
                    n => bytes.extend_from_slice(&piece[..n]),
                }
            }
            let rest = bytes.strip_prefix(&shifted[..]).unwrap();
            let seen = parse(rest);
            assert_numbered(&seen, LENGTH);
            assert_eq!(seen.texts.len(), expected);
            assert_eq!(seen.close, Some(reason.code()));
            drop(peer);
            conn.closed().await;
            at
        });
        tears.insert(at);
    }
    println!("{} different tears: {tears:?}", tears.len());
    assert!(tears.len() > 1, "the shift moves the tear");
}

#[test]
fn peer_that_never_reads_is_too_slow_at_the_byte_bound() {
    const LENGTH: usize = 1000;
    for outbox_bytes in [0, 500, 5000, 100_000] {
        on_shard(async {
            let (conn, mut peer) = pair(settings(outbox_bytes)).await;
            let mut sent = 0;
            let mut most = 0;
            while conn.closing().is_none() {
                conn.send(&[frame(sent, LENGTH), frame(sent + 1, LENGTH)]);
                sent += 2;
                most = most.max(conn.queued_bytes());
                assert!(sent < 1_000_000);
                // The writer runs too, and finds nothing to do.
                tokio::task::yield_now().await;
            }
            assert_eq!(conn.closing(), Some(Close::TooSlow));
            assert!(most <= outbox_bytes.max(LENGTH + 4 + FRAME_COST), "{most}");
            assert!(
                conn.queued_bytes() <= LENGTH + 4 + 64 + 2 * FRAME_COST,
                "the queue was dropped"
            );
            conn.drained(0).await;

            let (seen, orderly) = read_all(&mut peer).await;
            assert!(orderly);
            assert_numbered(&seen, LENGTH);
            assert_eq!(seen.close, Some(4003));
            assert!(seen.texts.len() < sent);
            drop(peer);
            conn.closed().await;
        });
    }
}

#[test]
fn tiny_frames_are_bounded_by_what_they_cost() {
    on_shard(async {
        let outbox_bytes = 10_000;
        let (conn, _peer) = pair(settings(outbox_bytes)).await;
        fill(&conn, 100);
        let mut pongs = 0;
        while conn.closing().is_none() {
            conn.send(&[pong_frame(b"")]);
            pongs += 1;
        }
        assert!(pongs <= outbox_bytes / FRAME_COST + 1, "{pongs}");
    });
}

#[test]
fn one_large_frame_is_taken_whatever_the_bound() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(100)).await;
        conn.send(&[frame(0, 300_000)]);
        assert!(conn.queued_bytes() > 100);
        assert_eq!(conn.closing(), None);
        let read = spawn_local(async move { read_all(&mut peer).await.0 });
        conn.drained(0).await;
        conn.close(Close::Normal);
        let seen = read.await.unwrap();
        assert_eq!((seen.texts.len(), seen.close), (1, Some(1000)));
    });
}

#[test]
fn no_progress_for_the_stall_time_is_too_slow() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let stall = conn.settings.stall;
        conn.check_stall(Instant::now() + 10 * stall);
        assert_eq!(conn.closing(), None, "nothing queued is no stall");

        let before = Instant::now();
        let sent = fill(&conn, 100);
        conn.send(&[frame(sent, 100)]);
        conn.check_stall(before + stall / 2);
        assert_eq!(conn.closing(), None);
        conn.check_stall(Instant::now() + stall);
        assert_eq!(conn.closing(), Some(Close::TooSlow));
        let (seen, _) = read_all(&mut peer).await;
        assert_numbered(&seen, 100);
        assert_eq!(seen.close, Some(4003));
    });
}

#[test]
fn progress_puts_the_stall_off() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        conn.send(&[frame(0, 500_000)]);
        let queued = conn.queued_bytes();
        assert!(queued > 0);
        let began = conn.outbox.borrow().as_ref().unwrap().moved_at;
        let mut piece = [0; 4096];
        while conn.queued_bytes() == queued {
            // Small reads until the kernel opens the window.
            peer.read_exact(&mut piece[..64]).await.unwrap();
            tokio::task::yield_now().await;
        }
        conn.check_stall(began + conn.settings.stall);
        assert_eq!(conn.closing(), None);
    });
}

#[test]
fn other_reasons_flush_the_queue_before_the_close_frame() {
    for reason in [Close::Draining, Close::Normal, Close::BadToken] {
        on_shard(async {
            let (conn, mut peer) = pair(settings(1 << 20)).await;
            let sent = fill(&conn, 1000);
            let more: Vec<Bytes> = (sent..sent + 300).map(|n| frame(n, 1000)).collect();
            conn.send(&more);
            conn.close(reason);
            // The first reason wins, and what is sent now is dropped.
            conn.close(Close::TooSlow);
            conn.send(&[frame(7, 1000)]);
            assert_eq!(conn.closing(), Some(reason));
            let (seen, orderly) = read_all(&mut peer).await;
            assert!(orderly);
            assert_numbered(&seen, 1000);
            assert_eq!(
                (seen.texts.len(), seen.close),
                (sent + 300, Some(reason.code()))
            );
            drop(peer);
            conn.closed().await;
            assert_eq!(conn.queued_bytes(), 0);
            conn.send(&[frame(8, 10)]);
            assert_eq!(conn.queued_bytes(), 0);
        });
    }
}

#[test]
fn close_finishes_without_any_handle() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let sent = fill(&conn, 1000);
        conn.close(Close::GoingAway);
        let gone = Rc::downgrade(&conn);
        drop(conn);
        let (seen, orderly) = read_all(&mut peer).await;
        assert!(orderly);
        assert_eq!((seen.texts.len(), seen.close), (sent, Some(1001)));
        drop(peer);
        yield_until("the closing task ends", || gone.strong_count() == 0).await;
    });
}

#[test]
fn dropping_an_open_connection_drops_the_socket_and_ends_the_writer() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let sent = fill(&conn, 1000);
        conn.send(&[frame(sent, 1000), frame(sent + 1, 1000)]);
        // Takes the place of the writer that `send` started, so that the test can wait for it.
        let writer = spawn_local(write_queue(Rc::downgrade(&conn)));
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let weak = Rc::downgrade(&conn);
        drop(conn);
        assert_eq!(weak.strong_count(), 0);
        let (seen, _) = read_all(&mut peer).await;
        assert!(seen.texts.len() < sent + 2);
        assert_eq!(seen.close, None);
        writer.await.unwrap();
    });
}

#[test]
fn peer_reset_during_a_queued_write_wakes_everybody() {
    on_shard(async {
        let (conn, peer) = pair(settings(1 << 20)).await;
        fill(&conn, 1000);
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let conn = Rc::clone(&conn);
                spawn_local(async move {
                    tokio::join!(conn.drained(0), conn.closed());
                })
            })
            .collect();
        let reader = {
            let conn = Rc::clone(&conn);
            spawn_local(async move {
                let buffer = RefCell::new(Vec::new());
                !matches!(conn.read_with(&buffer, |_| ()).await, Ok(Some(())))
            })
        };
        tokio::task::yield_now().await;
        peer.set_zero_linger().unwrap();
        drop(peer);
        for task in waiting {
            task.await.unwrap();
        }
        assert!(reader.await.unwrap());
        assert_eq!(conn.queued_bytes(), 0);
        assert_eq!(conn.closing(), None, "it died unasked");
        // All of this must be harmless now.
        conn.send(&[frame(0, 10)]);
        conn.check_stall(Instant::now() + DEADLINE * 10);
        conn.close(Close::Normal);
        conn.closed().await;
        conn.drained(0).await;
        assert_eq!(conn.queued_bytes(), 0);
        assert_eq!(Rc::strong_count(&conn), 1);
    });
}

#[test]
fn reset_with_nothing_queued_is_seen_by_the_next_send_or_read() {
    on_shard(async {
        let (conn, peer) = pair(settings(1 << 20)).await;
        peer.set_zero_linger().unwrap();
        drop(peer);
        let buffer = RefCell::new(Vec::new());
        assert!(conn.read_with(&buffer, |_| ()).await.is_err());
        conn.closed().await;

        let (conn, peer) = pair(settings(1 << 20)).await;
        peer.set_zero_linger().unwrap();
        drop(peer);
        while !conn.is_dead() {
            conn.send(&[frame(0, 10)]);
            tokio::task::yield_now().await;
        }
        conn.closed().await;
    });
}

#[test]
fn drained_resolves_at_its_mark() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let frames: Vec<Bytes> = (0..500).map(|n| frame(n, 1000)).collect();
        conn.send(&frames);
        let total = conn.queued_bytes();
        assert!(total > 400_000);
        conn.drained(total).await;
        let read = spawn_local(async move { read_all(&mut peer).await });
        for below in [total - 1, 300_000, 1000, 0] {
            conn.drained(below).await;
            assert!(conn.queued_bytes() <= below);
        }
        conn.close(Close::Normal);
        assert_eq!(read.await.unwrap().0.texts.len(), 500);
    });
}

#[test]
fn drained_resolves_when_the_connection_closes() {
    on_shard(async {
        let (conn, _peer) = pair(settings(1 << 20)).await;
        fill(&conn, 1000);
        let task = {
            let conn = Rc::clone(&conn);
            spawn_local(async move { conn.drained(0).await })
        };
        tokio::task::yield_now().await;
        conn.close(Close::Draining);
        task.await.unwrap();
        assert!(conn.queued_bytes() > 0);
    });
}

#[test]
fn sessions_share_a_read_buffer() {
    on_shard(async {
        let buffer = Rc::new(RefCell::new(Vec::new()));
        let mut peers = Vec::new();
        for n in 0..3_u8 {
            let (conn, mut peer) = pair(settings(1 << 20)).await;
            let buffer = Rc::clone(&buffer);
            let session = spawn_local(async move {
                let mut got = Vec::new();
                while let Some(count) = conn
                    .read_with(&buffer, |bytes| {
                        got.extend_from_slice(bytes);
                        bytes.fill(0xEE);
                        // The buffer is not borrowed by anything that sending needs.
                        conn.send(&[frame(bytes.len(), 10)]);
                        bytes.len()
                    })
                    .await
                    .unwrap()
                {
                    assert!(count > 0);
                }
                conn.close(Close::Normal);
                conn.closed().await;
                got
            });
            let peer = spawn_local(async move {
                for _ in 0..50 {
                    peer.write_all(&[n; 3000]).await.unwrap();
                    tokio::task::yield_now().await;
                }
                peer.shutdown().await.unwrap();
                read_all(&mut peer).await
            });
            peers.push((n, session, peer));
        }
        for (n, session, peer) in peers {
            assert_eq!(session.await.unwrap(), vec![n; 150_000]);
            // A peer that has ended only its half still gets the answer.
            let (seen, orderly) = peer.await.unwrap();
            assert!(orderly);
            assert_eq!((seen.torn, seen.close), (0, Some(1000)));
        }
    });
}

#[test]
fn a_read_that_is_given_up_loses_nothing() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let buffer = RefCell::new(vec![0; 16]);
        let write = spawn_local(async move {
            for byte in 0..200_u8 {
                peer.write_all(&[byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            peer
        });
        let mut got = Vec::new();
        while got.len() < 200 {
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                read = conn.read_with(&buffer, |bytes| got.extend_from_slice(bytes)) => {
                    read.unwrap().unwrap();
                }
            }
        }
        assert_eq!(got, (0..200).collect::<Vec<u8>>());
        drop(write.await.unwrap());
    });
}

#[test]
fn close_ends_a_waiting_reader() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let reader = {
            let conn = Rc::clone(&conn);
            spawn_local(async move {
                let buffer = RefCell::new(Vec::new());
                conn.read_with(&buffer, |_| ()).await.unwrap()
            })
        };
        tokio::task::yield_now().await;
        conn.close(Close::Revoked);
        assert_eq!(reader.await.unwrap(), None);
        assert!(!conn.is_dead(), "at once, not when the grace is over");
        let (seen, orderly) = read_all(&mut peer).await;
        assert!(orderly);
        assert_eq!(seen.close, Some(4002));
        drop(peer);
        conn.closed().await;
    });
}

/// If bytes from the peer were not read, the end would be a reset, which could overtake the close frame.
#[test]
fn peer_that_keeps_sending_still_gets_the_close_frame() {
    on_shard(async {
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let sent = fill(&conn, 1000);
        // More than the buffers hold. The peer reads nothing before it has sent all of it.
        peer.try_write(&[1; 1000]).unwrap();
        conn.close(Close::Draining);
        peer.write_all(&vec![2; 8 << 20]).await.unwrap();
        let (seen, orderly) = read_all(&mut peer).await;
        assert!(orderly);
        assert_numbered(&seen, 1000);
        assert_eq!((seen.texts.len(), seen.close), (sent, Some(4010)));
        peer.write_all(&[3; 1000]).await.unwrap();
        drop(peer);
        conn.closed().await;
    });
}

#[test]
fn grace_bounds_a_close_that_the_peer_does_not_follow() {
    on_shard(async {
        // A peer that reads nothing,
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        fill(&conn, 1000);
        conn.close_within(Close::Draining, Duration::from_millis(20));
        conn.closed().await;
        assert_eq!(conn.queued_bytes(), 0);
        assert!(!read_all(&mut peer).await.1, "reset");
        // a peer that reads and never ends,
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        conn.close_within(Close::Draining, Duration::from_millis(20));
        conn.closed().await;
        let mut bytes = Vec::new();
        // The close frame was sent before the reset, but the kernel may have dropped it because of the reset.
        if peer.read_to_end(&mut bytes).await.is_ok() {
            assert_eq!(parse(&bytes).close, Some(4010));
        }
        // and a peer that never stops sending.
        let (conn, mut peer) = pair(settings(1 << 20)).await;
        let flood = spawn_local(async move { while peer.write_all(&[0; 10_000]).await.is_ok() {} });
        conn.close_within(Close::TooSlow, Duration::from_millis(20));
        conn.closed().await;
        flood.await.unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The bookkeeping of the queue, compared with a flat copy of its bytes.
    #[test]
    fn outbox_is_the_rest_of_the_bytes(
        lengths in prop::collection::vec(1_usize..20, 1..40),
        steps in prop::collection::vec(0_usize..50, 0..40),
    ) {
        let frames: Vec<Bytes> = lengths.iter().enumerate().map(|(n, &l)| frame(n, l)).collect();
        let flat = frames.concat();
        let ends: Vec<usize> = frames.iter().scan(0, |end, f| { *end += f.len(); Some(*end) }).collect();
        let mut outbox = Outbox::boxed(frames[0].clone(), false);
        frames[1..].iter().for_each(|f| outbox.push(f.clone()));
        let mut written = 0;
        for step in steps {
            let step = step.min(outbox.bytes);
            outbox.advance(step);
            written += step;
            prop_assert_eq!(outbox.bytes, flat.len() - written);
            prop_assert_eq!(outbox.frames.iter().flatten().copied().collect::<Vec<u8>>(), &flat[written..]);
            prop_assert_eq!(outbox.torn, written != 0 && !ends.contains(&written));
        }
        // After the queue is dropped, the wire has whole frames.
        outbox.keep_torn_frame();
        let rest: Vec<u8> = outbox.frames.iter().flatten().copied().collect();
        prop_assert_eq!(outbox.bytes, rest.len());
        let wire = [&flat[..written], &rest].concat();
        prop_assert_eq!(parse(&wire).torn, 0);
        prop_assert!(outbox.frames.len() <= 1);
    }

    /// Random batches, and reads of random sizes at random times. Everything arrives, in order, followed by the close
    /// frame.
    #[test]
    fn random_traffic_arrives_whole(
        batches in prop::collection::vec((1_usize..100, 1_usize..2000, any::<bool>()), 1..12),
        pieces in prop::collection::vec(1_usize..3000, 1..20),
    ) {
        on_shard(async {
            let (conn, mut peer) = pair(settings(16 << 20)).await;
            let read = spawn_local(async move {
                let mut bytes = Vec::new();
                let mut piece = vec![0; 3000];
                for &size in pieces.iter().cycle() {
                    match peer.read(&mut piece[..size]).await.unwrap() {
                        0 => break,
                        n => bytes.extend_from_slice(&piece[..n]),
                    }
                }
                parse(&bytes)
            });
            let mut expected = Vec::new();
            for (count, length, wait) in batches {
                let frames: Vec<Bytes> = (0..count).map(|n| frame(n, length)).collect();
                expected.extend((0..count).map(|n| numbered(n, length)));
                conn.send(&frames);
                if wait {
                    conn.drained(length).await;
                }
            }
            conn.close(Close::Normal);
            let seen = read.await.unwrap();
            assert_eq!(seen, Seen { texts: expected, close: Some(1000), torn: 0 });
            conn.closed().await;
        });
    }
}

#[test]
fn what_is_put_off_does_not_count_as_what_a_reader_is_behind() {
    on_shard(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (peer, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let stream = accepted.unwrap().0;
        stream.writable().await.unwrap();
        let conn = Conn::new(stream, settings(16 * 1024));
        conn.more_follows(true);
        // Together more than the bound, which the socket takes at once: one by one, and in one call.
        for n in 0..20 {
            conn.send(&[frame(n, 1000)]);
        }
        let more: Vec<Bytes> = (20..40).map(|n| frame(n, 1000)).collect();
        conn.send(&more);
        assert_eq!(conn.closing(), None);
        conn.more_follows(false);
        conn.close(Close::GoingAway);
        let mut bytes = Vec::new();
        let mut peer = peer.unwrap();
        peer.read_to_end(&mut bytes).await.unwrap();
        let texts: Vec<String> = (0..40).map(|n| numbered(n, 1000)).collect();
        assert_eq!(parse(&bytes).texts, texts);
    });
}
