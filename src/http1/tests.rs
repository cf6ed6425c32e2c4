use http_body_util::{BodyExt as _, Full};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};

use super::*;

const LIMITS: Limits = Limits {
    keep_alive: Duration::from_secs(90),
    header: Duration::from_secs(10),
    stall: Duration::from_secs(30),
};

const SECOND: Duration = Duration::from_secs(1);

const GET: &[u8] = b"GET /0/3 HTTP/1.1\r\nHost: x\r\n\r\n";

/// The client's side of a connection with a buffer of `buffer` bytes each way. The path gives the seconds for which the
/// request is processed, and the bytes of the answer.
fn served(tasks: &Tasks, buffer: usize) -> DuplexStream {
    let service = service_fn(async |request: Request<Incoming>| {
        let path = request.uri().path().to_owned();
        let mut numbers = path.split('/').skip(1).map(|word| word.parse().unwrap());
        let (seconds, bytes) = (numbers.next().unwrap(), numbers.next().unwrap());
        request.into_body().collect().await.unwrap();
        sleep(Duration::from_secs(seconds)).await;
        let bytes = vec![b'x'; usize::try_from(bytes).unwrap()];
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(bytes))))
    });
    let (client, server) = duplex(buffer);
    tasks.spawn(
        "connection",
        connection(server, service, LIMITS, tasks.clone()),
    );
    client
}

/// Reads one answer with a body of `x`s.
async fn answer(client: &mut DuplexStream) {
    let mut text = Vec::new();
    while !text.ends_with(b"xxx") {
        assert_ne!(client.read_buf(&mut text).await.unwrap(), 0, "closed");
    }
    assert!(text.starts_with(b"HTTP/1.1 200"));
}

/// How long it takes until the connection is closed; nothing may arrive before.
async fn closed_after(client: &mut DuplexStream) -> Duration {
    let begun = Instant::now();
    let read = timeout(Duration::from_secs(3600), client.read_u8()).await;
    assert!(read.expect("it is kept for ever").is_err(), "a byte came");
    begun.elapsed()
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_kept_for_the_next_request_and_not_for_ever() {
    let tasks = Tasks::default();
    let mut client = served(&tasks, 4096);
    for idle in [0, 9, 11, 75, 89] {
        sleep(Duration::from_secs(idle)).await;
        client.write_all(GET).await.unwrap();
        answer(&mut client).await;
    }
    assert_eq!(closed_after(&mut client).await, LIMITS.keep_alive);
    // A client that never sends anything.
    let mut client = served(&tasks, 4096);
    assert_eq!(closed_after(&mut client).await, LIMITS.keep_alive);
}

#[tokio::test(start_paused = true)]
async fn the_time_for_a_header_counts_from_its_first_byte() {
    let tasks = Tasks::default();
    for (before, idle) in [(0, 0), (0, 60), (1, 0), (1, 60), (3, 80)] {
        let mut client = served(&tasks, 4096);
        for _ in 0..before {
            client.write_all(GET).await.unwrap();
            answer(&mut client).await;
        }
        sleep(idle * SECOND).await;
        // One byte a second, never a complete header.
        let begun = Instant::now();
        let mut dripped = 0;
        for byte in b"GET /0/3 HTTP/1.1\r\nHost: "
            .iter()
            .chain([b'x'; 1000].iter())
        {
            if client.write_all(&[*byte]).await.is_err() {
                break;
            }
            dripped += 1;
            sleep(SECOND).await;
        }
        assert!(dripped >= 10, "{before} {idle}: {dripped} bytes");
        assert!(begun.elapsed() <= LIMITS.header + SECOND, "{before} {idle}");
    }
    // Slow, but in time.
    let mut client = served(&tasks, 4096);
    for part in GET.chunks(GET.len() / 8) {
        client.write_all(part).await.unwrap();
        sleep(SECOND).await;
    }
    answer(&mut client).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_has_said_everything_gets_its_answers() {
    let post = "POST /1/3 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody";
    let chunked =
        "POST /2/3 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n";
    let get = "GET /3/3 HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /1/3 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let old = "GET /1/3 HTTP/1.0\r\n\r\n";
    for requests in [
        &[post][..],
        &[chunked],
        &[get],
        &[last],
        &[old],
        &[get, post, chunked, get],
        &[post, last],
    ] {
        for at_once in [true, false] {
            let tasks = Tasks::default();
            let mut client = served(&tasks, 4096);
            let all = requests.concat();
            if at_once {
                client.write_all(all.as_bytes()).await.unwrap();
            } else {
                for byte in all.as_bytes() {
                    client.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
            client.shutdown().await.unwrap();
            let mut text = String::new();
            client.read_to_string(&mut text).await.unwrap();
            let answers = text.matches("200 OK").count();
            assert_eq!(answers, requests.len(), "{requests:?}: {text}");
            // The connection is not kept for a client that sends nothing more.
            let begun = Instant::now();
            tasks.drain(SECOND).await.unwrap();
            assert_eq!(begun.elapsed(), Duration::ZERO, "{requests:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn who_takes_nothing_of_an_answer_is_given_up_and_who_takes_it_slowly_is_not() {
    let ask = b"GET /0/20000 HTTP/1.1\r\nHost: x\r\n\r\n";
    let tasks = Tasks::default();
    let mut client = served(&tasks, 1024);
    client.write_all(ask).await.unwrap();
    let mut taken = Vec::new();
    while taken.len() < 20_000 {
        sleep(LIMITS.stall - SECOND).await;
        assert_ne!(
            client.read_buf(&mut taken).await.unwrap(),
            0,
            "{}",
            taken.len()
        );
    }
    let mut client = served(&tasks, 1024);
    client.write_all(ask).await.unwrap();
    sleep(LIMITS.stall + SECOND).await;
    let mut rest = Vec::new();
    let read = timeout(SECOND, client.read_to_end(&mut rest)).await;
    assert!(read.is_ok() && rest.len() < 2048, "{read:?} {}", rest.len());
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_requests_and_not_for_clients() {
    let kept = [GET, b"GET /0/3 HT"].concat();
    let unread = b"GET /0/20000 HTTP/1.1\r\nHost: x\r\n\r\n";
    for (sent, most) in [
        (&b""[..], Duration::ZERO),
        (GET, Duration::ZERO),
        (b"G", LAST_STEP),
        (b"GET /0/3 HTTP/1.1\r\nHost: ", LAST_STEP),
        (&kept, LAST_STEP),
        (unread, LAST_STEP),
        (b"GET /7/3 HTTP/1.1\r\nHost: x\r\n\r\n", 7 * SECOND),
    ] {
        let tasks = Tasks::default();
        let mut client = served(&tasks, 1024);
        client.write_all(sent).await.unwrap();
        // Everything that can happen has happened.
        sleep(Duration::from_millis(1)).await;
        let begun = Instant::now();
        let drained = tasks.drain(60 * SECOND).await;
        let what = String::from_utf8_lossy(sent);
        assert!(
            drained.is_ok() && begun.elapsed() <= most,
            "{what:?}: {:?}",
            begun.elapsed()
        );
        if most == 7 * SECOND {
            answer(&mut client).await;
        }
    }
}
