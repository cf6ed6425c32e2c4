//! A stand-in of Apple's service: HTTP/2 over TLS, with a certificate of the tests.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, StatusCode, Version, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use jsonwebtoken::Algorithm;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

use super::{devices, done, group, key_file, metric_is, say, token, toml, verified};
use crate::support::{mesh::Mesh, nats_url};

/// A request: its headers by name, its path, its body.
struct Got {
    path: String,
    headers: hyper::HeaderMap,
    body: Value,
}

type All = Arc<Mutex<Vec<Got>>>;

async fn answer(all: All, request: Request<Incoming>) -> hyper::Result<Response<Full<Bytes>>> {
    assert_eq!(request.version(), Version::HTTP_2);
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let path = head.uri.path().to_owned();
    let (status, text) = match &*path {
        "/3/device/dead" => (
            StatusCode::GONE,
            json!({"reason": "Unregistered"}).to_string(),
        ),
        _ => (StatusCode::OK, String::new()),
    };
    all.lock().push(Got {
        path,
        headers: head.headers,
        body: serde_json::from_slice(&body).unwrap(),
    });
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    Ok(response)
}

/// Returns its port, and what it gets.
async fn start() -> (u16, All) {
    let certificates = CertificateDer::pem_file_iter(key_file("nats-server.pem")).unwrap();
    let certificates = certificates.collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(key_file("nats-server.key")).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let all = All::default();
    let given = Arc::clone(&all);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, all) = (acceptor.clone(), Arc::clone(&given));
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let service = service_fn(move |request| answer(Arc::clone(&all), request));
                let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                // The notifier ends it at the end of the test.
                let _ended = server.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (port, all)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_apns_is_notified_and_gets_its_badge() {
    let (port, all) = start().await;
    let key = key_file("ec_private.pem");
    let more = format!(
        "allow = ['127.0.0.1', '::1']\napns_url = 'https://localhost:{port}'\napns_key_file = {:?}\n\
         apns_key_id = 'KEY7'\napns_team_id = 'TEAM9'",
        key.display().to_string()
    );
    let toml = toml("").replace("allow = ['127.0.0.1']\n", "");
    let mesh = Mesh::start(nats_url(), 1, &format!("{toml}{more}")).await;
    let trusted = key_file("nats-ca.pem").display().to_string();
    let notifier = mesh.start_notifier(&[("SSL_CERT_FILE", trusted)]).await;
    let address = mesh.edges[0].address;
    let room = group(address, "apns", &["kim", "max"], "Tea").await;
    for (device, token_of) in [("phone", "00ff"), ("old", "dead")] {
        let body = json!({"kind": "apns", "token": token_of, "topic": "org.example.app"});
        done(
            address,
            "PUT",
            &format!("/v1/devices/{device}"),
            &token("kim"),
            body,
        )
        .await;
    }
    let said = say(
        address,
        &room,
        "max",
        json!({"id": "1", "body": {"text": "hi"}}),
    )
    .await;
    metric_is(&notifier, "sent", "apns", 1).await;
    metric_is(&notifier, "gone", "apns", 1).await;
    assert_eq!(devices(address, "kim").await, ["phone"]);
    {
        let all = all.lock();
        let got = all.iter().find(|got| got.path == "/3/device/00ff").unwrap();
        let header = |name: &str| got.headers[name].to_str().unwrap();
        assert_eq!(header("apns-topic"), "org.example.app");
        assert_eq!(header("apns-push-type"), "alert");
        assert!(header("apns-collapse-id").len() <= 64);
        let jwt = header("authorization").strip_prefix("bearer ").unwrap();
        let (header, claims) = verified(jwt, Algorithm::ES256, "ec_public.pem");
        assert_eq!(header.kid.as_deref(), Some("KEY7"));
        assert_eq!(claims["iss"], "TEAM9");
        let aps = &got.body["aps"];
        assert_eq!(aps["alert"], json!({"title": "max in Tea", "body": "hi"}));
        assert_eq!(
            (&aps["badge"], &got.body["message"]),
            (&json!(1), &json!("max/1"))
        );
    }
    let path = format!("/v1/rooms/{room}/read");
    done(
        address,
        "PUT",
        &path,
        &token("kim"),
        json!({"cursor": said["cursor"]}),
    )
    .await;
    metric_is(&notifier, "sent", "apns", 2).await;
    let all = all.lock();
    let last = all.last().unwrap();
    assert_eq!(last.headers["apns-push-type"], "background");
    assert_eq!(last.body["aps"]["badge"], 0);
    assert_eq!(last.body["aps"].get("alert"), None);
}
