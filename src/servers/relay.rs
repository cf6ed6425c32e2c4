//! Links between the spines of one machine's regions, with a delay; links can be cut and healed.
//!
//! Each region has one *gate*: a port on loopback that stands for its spine. All gateway connections to the spine go
//! through it, because the others are given no other address. Gateways pass on every address they know, so a port per
//! pair of regions would be used by other spines too. Therefore the calling spine is read from its greeting (`CONNECT`,
//! which a gateway sends first, and which contains its name).
//!
//! All other data is passed on unread. At most [`MAX_CHUNKS`] chunks per connection and direction are held: a sender
//! that is faster than the other side reads has to wait, as on any connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{model::Region, runtime::Tasks};

/// Largest number of bytes that are read, and delayed, at once.
const CHUNK: usize = 64 * 1024;

/// Chunks in transit in one direction of a connection. With a delay, this limits the throughput to this times [`CHUNK`]
/// per delay: 50 MB/s at 80 ms.
const MAX_CHUNKS: usize = 64;

/// Longest greeting that is read.
const GREETING: usize = 16 * 1024;

/// Pause after a failed `accept`, which fails again at once while there are no file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The effect of a cut on connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Nothing is transmitted and neither side is notified, as when the network is gone. Data in transit arrives after
    /// the heal, unless its connection was given up.
    Stall,
    /// Connections are closed, also new ones, as by a firewall that rejects them.
    Close,
}

/// The links between the regions of one machine. Dropping it closes them.
#[derive(Debug)]
pub struct Relay {
    gates: BTreeMap<Region, Gate>,
    cuts: watch::Sender<Cuts>,
    tasks: Tasks,
}

/// One direction of the link between two regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The region whose spine opened the connection.
    pub from: Region,
    /// The region to whose spine the connection leads.
    pub to: Region,
    /// `None`: the link is not cut.
    pub cut: Option<Cut>,
}

#[derive(Debug)]
struct Gate {
    address: SocketAddr,
    /// The spine's own gateway port.
    target: watch::Sender<Option<SocketAddr>>,
}

/// The regions that are cut off.
type Cuts = Arc<BTreeMap<Region, Cut>>;

/// The state that one connection depends on.
#[derive(Debug, Clone)]
struct Passage {
    /// The regions at its ends, as far as they are known.
    ends: BTreeSet<Region>,
    cuts: watch::Receiver<Cuts>,
    delay: Duration,
}

impl Relay {
    /// Opens a gate for each of `regions`. Connections wait until [`Self::lead_to`] is called. `delay` applies to each
    /// direction.
    ///
    /// # Errors
    /// If a port on loopback can't be opened.
    pub async fn start(regions: &[Region], delay: Duration) -> io::Result<Self> {
        let (cuts, _) = watch::channel(Cuts::default());
        let tasks = Tasks::default();
        let mut gates = BTreeMap::new();
        for region in regions {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let address = listener.local_addr()?;
            let (target, targets) = watch::channel(None);
            let passage = Passage {
                ends: BTreeSet::from([region.clone()]),
                cuts: cuts.subscribe(),
                delay,
            };
            let known: BTreeSet<Region> = regions.iter().cloned().collect();
            tasks.spawn_until_stopping(
                "gate",
                accept(listener, targets, passage, known, tasks.clone()),
            );
            gates.insert(region.clone(), Gate { address, target });
        }
        Ok(Self { gates, cuts, tasks })
    }

    /// The address at which the others reach the spine of each region: for `SpineOptions::gateways`.
    #[must_use]
    pub fn gates(&self) -> Vec<(Region, SocketAddr)> {
        self.gates
            .iter()
            .map(|(region, gate)| (region.clone(), gate.address))
            .collect()
    }

    /// Sets the target of the gate of `region`: its spine's own gateway port.
    pub fn lead_to(&self, region: &Region, spine: SocketAddr) {
        if let Some(gate) = self.gates.get(region) {
            gate.target.send_replace(Some(spine));
        }
    }

    /// Cuts `region` off from all others, both ways. If it is already cut off, `how` replaces the earlier way.
    pub fn cut(&self, region: &Region, how: Cut) {
        self.cuts.send_modify(|cuts| {
            Arc::make_mut(cuts).insert(region.clone(), how);
        });
    }

    /// Ends the cut of `region`. Its links to other regions that are cut off stay cut.
    pub fn heal(&self, region: &Region) {
        self.cuts.send_modify(|cuts| {
            Arc::make_mut(cuts).remove(region);
        });
    }

    /// All links.
    #[must_use]
    pub fn links(&self) -> Vec<Link> {
        let cuts = self.cuts.borrow();
        let pairs = self.gates.keys().flat_map(|from| {
            let others = self.gates.keys().filter(move |to| *to != from);
            others.map(move |to| (from, to))
        });
        pairs
            .map(|(from, to)| Link {
                from: from.clone(),
                to: to.clone(),
                cut: cut_of(&cuts, [from, to]),
            })
            .collect()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

/// The cut that applies if any of `ends` is cut off: of two, the stricter one.
fn cut_of<'a>(
    cuts: &BTreeMap<Region, Cut>,
    ends: impl IntoIterator<Item = &'a Region>,
) -> Option<Cut> {
    let found: Vec<Cut> = ends
        .into_iter()
        .filter_map(|end| cuts.get(end).copied())
        .collect();
    if found.contains(&Cut::Close) {
        return Some(Cut::Close);
    }
    found.first().copied()
}

impl Passage {
    /// Returns when the delay of data that arrived at `since` is over and no cut stalls it. `None`: the connection must
    /// be closed. Cancel-safe.
    async fn pass(&mut self, since: Instant) -> Option<()> {
        sleep_until(since + self.delay).await;
        let ends = &self.ends;
        let whole = self
            .cuts
            .wait_for(|cuts| cut_of(cuts, ends) != Some(Cut::Stall))
            .await
            .ok()?;
        match cut_of(&whole, ends) {
            None => Some(()),
            Some(_) => None,
        }
    }

    /// Returns when the connection must be closed. Cancel-safe.
    async fn closed(&mut self) {
        let ends = &self.ends;
        // Fails if the relay is gone, which also closes the connection.
        drop(
            self.cuts
                .wait_for(|cuts| cut_of(cuts, ends) == Some(Cut::Close))
                .await,
        );
    }
}

/// Accepts the connections of one gate.
async fn accept(
    listener: TcpListener,
    targets: watch::Receiver<Option<SocketAddr>>,
    passage: Passage,
    known: BTreeSet<Region>,
    tasks: Tasks,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (mut targets, passage, known) =
                    (targets.clone(), passage.clone(), known.clone());
                tasks.spawn_until_stopping("link", async move {
                    let Ok(target) = targets.wait_for(Option::is_some).await.map(|t| *t) else {
                        return;
                    };
                    let Some(target) = target else { return };
                    let mut watched = passage.clone();
                    // Both branches may be dropped: whichever ends first ends the connection.
                    let ended = tokio::select! {
                        ended = connect(stream, target, passage, &known) => ended,
                        () = watched.closed() => return,
                    };
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a link between regions ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a gate can't accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, until it ends at either side.
async fn connect(
    caller: TcpStream,
    target: SocketAddr,
    mut passage: Passage,
    known: &BTreeSet<Region>,
) -> io::Result<()> {
    let mut caller = caller;
    caller.set_nodelay(true)?;
    // A caller that waits at the gate of a region that is cut off may give up. The called side always speaks first.
    // Both branches are cancel-safe.
    let mut early = [0];
    tokio::select! {
        passed = passage.pass(Instant::now()) => if passed.is_none() { return Ok(()) },
        _gone = caller.peek(&mut early) => return Ok(()),
    }
    let mut called = TcpStream::connect(target).await?;
    called.set_nodelay(true)?;
    let (from, greeting) = greet(&mut caller, &mut called, &mut passage).await?;
    let Some(from) = from.filter(|from| known.contains(from)) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the caller is not a spine of this machine",
        ));
    };
    passage.ends.insert(from);
    let (caller_reads, caller_writes) = caller.into_split();
    let (called_reads, called_writes) = called.into_split();
    let mut watched = passage.clone();
    tokio::select! {
        ended = carry(caller_reads, called_writes, greeting, passage.clone()) => ended,
        ended = carry(called_reads, caller_writes, Vec::new(), passage) => ended,
        () = watched.closed() => Ok(()),
    }
}

/// Passes on what the called side sends until the caller has sent its greeting. Returns the caller's region, if the
/// greeting names it, and what the caller has sent, which is not passed on yet.
async fn greet(
    caller: &mut TcpStream,
    called: &mut TcpStream,
    passage: &mut Passage,
) -> io::Result<(Option<Region>, Vec<u8>)> {
    let mut sent = Vec::new();
    let (mut from_caller, mut from_called) = (vec![0; GREETING], vec![0; CHUNK]);
    loop {
        // Cancel-safe: a read that is dropped has read nothing.
        tokio::select! {
            read = caller.read(&mut from_caller) => match read? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => sent.extend_from_slice(from_caller.get(..length).unwrap_or_default()),
            },
            read = called.read(&mut from_called) => match read? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => {
                    if passage.pass(Instant::now()).await.is_none() {
                        return Err(io::ErrorKind::ConnectionReset.into());
                    }
                    caller.write_all(from_called.get(..length).unwrap_or_default()).await?;
                }
            },
        }
        if let Some(end) = sent.iter().position(|byte| *byte == b'\n') {
            return Ok((caller_of(sent.get(..end).unwrap_or_default()), sent));
        }
        if sent.len() >= GREETING {
            return Ok((None, sent));
        }
    }
}

/// The gateway named in a line `CONNECT {…}`.
fn caller_of(greeting: &[u8]) -> Option<Region> {
    let options: Value = serde_json::from_slice(greeting.strip_prefix(b"CONNECT ")?).ok()?;
    Region::parse(options.get("gateway")?.as_str()?)
}

/// Carries `first`, then what is read from `source`, to `sink`, each chunk when it may pass. Returns when all of it has
/// arrived after the end of `source`.
async fn carry(
    mut source: impl AsyncRead + Unpin,
    mut sink: impl AsyncWrite + Unpin,
    first: Vec<u8>,
    mut passage: Passage,
) -> io::Result<()> {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(MAX_CHUNKS);
    let read = async move {
        let mut buffer = vec![0; CHUNK];
        let mut chunk = first;
        loop {
            if !chunk.is_empty() && queue.send((Instant::now(), chunk)).await.is_err() {
                return Ok(());
            }
            let length = source.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            chunk = buffer.get(..length).unwrap_or_default().to_vec();
        }
    };
    let write = async {
        while let Some((since, chunk)) = queued.recv().await {
            if passage.pass(since).await.is_none() {
                return Ok(());
            }
            sink.write_all(&chunk).await?;
        }
        sink.shutdown().await
    };
    tokio::try_join!(read, write).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stand-in for a spine: says `INFO`, expects a greeting, then echoes.
    async fn spine() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Tasks::default().spawn("spine", async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                Tasks::default().spawn("echo", async move {
                    stream.write_all(b"INFO {}\r\n").await.unwrap();
                    let (mut reads, mut writes) = stream.split();
                    drop(tokio::io::copy(&mut reads, &mut writes).await);
                });
            }
        });
        address
    }

    async fn relay(delay: Duration) -> (Relay, [Region; 3]) {
        let regions = ["a", "b", "c"].map(|name| Region::parse(name).unwrap());
        let relay = Relay::start(&regions, delay).await.unwrap();
        for region in &regions {
            relay.lead_to(region, spine().await);
        }
        (relay, regions)
    }

    fn gate(relay: &Relay, region: &Region) -> SocketAddr {
        relay.gates[region].address
    }

    const GREETS: &[u8] = b"CONNECT {\"gateway\":\"a\"}\r\n";

    /// Connects as the spine of `a`, and gets its own greeting back.
    async fn call(address: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(take(&mut stream, 9).await.unwrap(), b"INFO {}\r\n");
        stream.write_all(GREETS).await.unwrap();
        assert_eq!(take(&mut stream, GREETS.len()).await.unwrap(), GREETS);
        stream
    }

    async fn take(stream: &mut TcpStream, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    #[tokio::test]
    async fn what_is_said_during_a_stall_arrives_after_it_and_in_order() {
        let (relay, [a, b, c]) = relay(Duration::ZERO).await;
        let mut stream = call(gate(&relay, &b)).await;
        let mut untouched = call(gate(&relay, &c)).await;
        relay.cut(&b, Cut::Stall);
        stream.write_all(b"one").await.unwrap();
        stream.write_all(b"two").await.unwrap();
        // A caller that connects now receives nothing before the heal.
        let mut waiting = TcpStream::connect(gate(&relay, &b)).await.unwrap();
        // Meanwhile a connection through another region's gate is carried, so the stall is not just slowness.
        untouched.write_all(b"here").await.unwrap();
        assert_eq!(take(&mut untouched, 4).await.unwrap(), b"here");
        assert_eq!(
            stream.try_read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert_eq!(
            waiting.try_read(&mut [0; 8]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        relay.heal(&b);
        assert_eq!(take(&mut stream, 6).await.unwrap(), b"onetwo");
        assert_eq!(take(&mut waiting, 4).await.unwrap(), b"INFO");

        // A caller that is cut off is so at every gate.
        relay.cut(&a, Cut::Close);
        take(&mut stream, 1).await.unwrap_err();
        take(&mut untouched, 1).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_closed_link_ends_connections_and_takes_none() {
        let (relay, [a, b, c]) = relay(Duration::ZERO).await;
        let mut stream = call(gate(&relay, &b)).await;
        relay.cut(&b, Cut::Close);
        take(&mut stream, 1).await.unwrap_err();
        let mut refused = TcpStream::connect(gate(&relay, &b)).await.unwrap();
        take(&mut refused, 1).await.unwrap_err();
        let cut: Vec<_> = relay
            .links()
            .into_iter()
            .filter_map(|link| link.cut.map(|cut| (link.from, link.to, cut)))
            .collect();
        let closed = |from: &Region, to: &Region| (from.clone(), to.clone(), Cut::Close);
        assert_eq!(
            cut,
            [
                closed(&a, &b),
                closed(&b, &a),
                closed(&b, &c),
                closed(&c, &b)
            ]
        );
        relay.heal(&b);
        call(gate(&relay, &b)).await;
    }

    #[tokio::test]
    async fn bytes_take_the_delay_each_way_and_stay_in_order() {
        let delay = Duration::from_millis(60);
        let (relay, [_, b, _]) = relay(delay).await;
        let mut stream = call(gate(&relay, &b)).await;
        let (mut reads, mut writes) = stream.split();
        let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_be_bytes).collect();
        let started = Instant::now();
        let mut received = vec![0; sent.len()];
        let (written, read) =
            tokio::join!(writes.write_all(&sent), reads.read_exact(&mut received));
        written.unwrap();
        read.unwrap();
        assert!(received == sent);
        assert!(started.elapsed() >= 2 * delay);
    }

    #[tokio::test]
    async fn who_is_no_spine_is_turned_away() {
        let (relay, [_, b, _]) = relay(Duration::ZERO).await;
        for greeting in [
            "CONNECT {\"gateway\":\"z\"}\r\n",
            "CONNECT {}\r\n",
            "PING\r\n",
        ] {
            let mut stream = TcpStream::connect(gate(&relay, &b)).await.unwrap();
            take(&mut stream, 9).await.unwrap();
            stream.write_all(greeting.as_bytes()).await.unwrap();
            take(&mut stream, 1).await.unwrap_err();
        }
    }
}
