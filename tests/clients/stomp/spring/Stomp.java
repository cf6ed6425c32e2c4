import java.lang.reflect.Type;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Instant;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.BooleanSupplier;

import org.springframework.messaging.converter.StringMessageConverter;
import org.springframework.messaging.simp.stomp.StompCommand;
import org.springframework.messaging.simp.stomp.StompFrameHandler;
import org.springframework.messaging.simp.stomp.StompHeaders;
import org.springframework.messaging.simp.stomp.StompSession;
import org.springframework.messaging.simp.stomp.StompSessionHandlerAdapter;
import org.springframework.scheduling.concurrent.ThreadPoolTaskScheduler;
import org.springframework.web.socket.WebSocketHttpHeaders;
import org.springframework.web.socket.client.standard.StandardWebSocketClient;
import org.springframework.web.socket.messaging.WebSocketStompClient;

import jakarta.websocket.ContainerProvider;

/** Spring's STOMP client, unmodified, against natter: java Stomp.java HOST:PORT TOKEN-OF-KIM TOKEN-OF-ANOTHER. Prints `N passed, N failed`. */
public class Stomp {

    private static final long DEADLINE_SECONDS = 15;
    private static final int LARGEST_FRAME = 256 * 1024;

    private static String address;
    private static String token;
    private static String otherToken;
    private static final ThreadPoolTaskScheduler scheduler = new ThreadPoolTaskScheduler();

    /** What a session said. */
    private static final class Heard extends StompSessionHandlerAdapter {
        final CompletableFuture<StompHeaders> connected = new CompletableFuture<>();
        final CompletableFuture<StompHeaders> error = new CompletableFuture<>();
        final CompletableFuture<Throwable> failure = new CompletableFuture<>();
        volatile String errorBody;

        @Override
        public void afterConnected(StompSession session, StompHeaders headers) {
            connected.complete(headers);
        }

        @Override
        public void handleFrame(StompHeaders headers, Object payload) {
            errorBody = (String) payload;
            error.complete(headers);
        }

        @Override
        public void handleException(StompSession session, StompCommand command, StompHeaders headers, byte[] payload, Throwable exception) {
            failure.complete(exception);
        }

        @Override
        public void handleTransportError(StompSession session, Throwable exception) {
            failure.complete(exception);
        }
    }

    private record Received(StompHeaders headers, String body) {}

    /** The messages of a subscription. */
    private static final class Inbox implements StompFrameHandler {
        final BlockingQueue<Received> messages = new ArrayBlockingQueue<>(1000);

        @Override
        public Type getPayloadType(StompHeaders headers) {
            return String.class;
        }

        @Override
        public void handleFrame(StompHeaders headers, Object payload) {
            messages.add(new Received(headers, payload == null ? "" : (String) payload));
        }

        Received next() throws InterruptedException {
            Received received = messages.poll(DEADLINE_SECONDS, TimeUnit.SECONDS);
            check(received != null, "a message that did not come");
            return received;
        }
    }

    /** Takes text in any content-type, JSON too. */
    private static final class AnyText extends StringMessageConverter {
        AnyText() {
            setContentTypeResolver(headers -> null);
        }
    }

    private interface Scenario {
        void run() throws Exception;
    }

    private static void check(boolean condition, String what) {
        if (!condition) throw new AssertionError(what);
    }

    private static void equal(Object got, Object expected, String what) {
        check(expected.equals(got), what + ": " + got + " instead of " + expected);
    }

    private static <T> T await(CompletableFuture<T> future) throws Exception {
        return future.get(DEADLINE_SECONDS, TimeUnit.SECONDS);
    }

    private static void until(String what, BooleanSupplier condition) throws InterruptedException {
        Instant end = Instant.now().plusSeconds(DEADLINE_SECONDS);
        while (!condition.getAsBoolean()) {
            check(Instant.now().isBefore(end), what);
            Thread.sleep(5);
        }
    }

    private static WebSocketStompClient client() {
        // Tomcat takes text messages of 8,192 characters, if it is not told otherwise.
        var container = ContainerProvider.getWebSocketContainer();
        container.setDefaultMaxTextMessageBufferSize(LARGEST_FRAME);
        var client = new WebSocketStompClient(new StandardWebSocketClient(container));
        client.setInboundMessageSizeLimit(LARGEST_FRAME);
        client.setMessageConverter(new AnyText());
        client.setTaskScheduler(scheduler); // receipts and heart-beats need one
        return client;
    }

    private static StompSession connect(Heard heard, String... headers) throws Exception {
        var connect = new StompHeaders();
        if (headers.length == 0) connect.setPasscode(token);
        for (int at = 0; at < headers.length; at += 2) connect.set(headers[at], headers[at + 1]);
        return await(client().connectAsync("ws://" + address + "/stomp", new WebSocketHttpHeaders(), connect, heard));
    }

    private static Inbox subscribe(StompSession session, String destination, String... more) throws Exception {
        var headers = new StompHeaders();
        headers.setDestination(destination);
        headers.setReceipt(UUID.randomUUID().toString());
        for (int at = 0; at < more.length; at += 2) headers.set(more[at], more[at + 1]);
        var inbox = new Inbox();
        var done = new CompletableFuture<Void>();
        session.subscribe(headers, inbox).addReceiptTask(() -> done.complete(null));
        await(done);
        return inbox;
    }

    private static void send(StompSession session, String destination, String body, String... more) throws Exception {
        var headers = new StompHeaders();
        headers.setDestination(destination);
        headers.setReceipt(UUID.randomUUID().toString());
        for (int at = 0; at < more.length; at += 2) headers.set(more[at], more[at + 1]);
        var done = new CompletableFuture<Void>();
        session.send(headers, body).addReceiptTask(() -> done.complete(null));
        await(done);
    }

    private static String newRoom() {
        return "chat:spring-" + UUID.randomUUID().toString().substring(0, 8);
    }

    private static boolean unreadIs(String room, int count) {
        try {
            var request = HttpRequest.newBuilder(URI.create("http://" + address + "/v1/unread"))
                .header("Authorization", "Bearer " + token)
                .POST(HttpRequest.BodyPublishers.ofString("{\"rooms\":[\"" + room + "\"]}"))
                .build();
            var body = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body();
            return body.contains("\"count\":" + count + "}") || body.contains("\"count\":" + count + ",");
        } catch (Exception exception) {
            throw new AssertionError(exception);
        }
    }

    // Scenarios -------------------------------------------------------------------------------------------------------

    private static void connectsWithToken() throws Exception {
        for (String[] credentials : List.of(
            new String[] {"passcode", token},
            new String[] {"login", "kim", "passcode", token},
            new String[] {"Authorization", "Bearer " + token})) {
            var heard = new Heard();
            StompSession session = connect(heard, credentials);
            StompHeaders headers = await(heard.connected);
            equal(headers.getFirst("version"), "1.2", "the version");
            equal(headers.getFirst("user-name"), "kim", "the user");
            session.disconnect();
        }
        var handshake = new WebSocketHttpHeaders();
        handshake.set("Authorization", "Bearer " + token);
        var url = "ws://" + address + "/stomp";
        await(client().connectAsync(url, handshake, new StompHeaders(), new Heard())).disconnect();
    }

    private static void wrongTokenIsAnErrorFrame() throws Exception {
        var heard = new Heard();
        var headers = new StompHeaders();
        headers.setPasscode("not-a-token");
        client().connectAsync("ws://" + address + "/stomp", new WebSocketHttpHeaders(), headers, heard);
        check(await(heard.error).getFirst("message") != null, "no message header");
        check(heard.errorBody != null && !heard.errorBody.isEmpty(), "no body");
        await(heard.failure); // the close
        check(!heard.connected.isDone(), "it was connected");
    }

    private static void messagesArrive() throws Exception {
        String destination = "/topic/" + newRoom();
        var heard = new Heard();
        StompSession session = connect(heard);
        Inbox inbox = subscribe(session, destination);
        String large = "한".repeat(20 * 1024);
        String[][] bodies = {
            {"안녕 👩‍👩‍👧‍👦: \n \\ \"", "text/plain;charset=UTF-8", "text/plain"},
            {"{\"text\":\"안녕\",\"n\":1.0}", "application/json", "application/json"},
            {"a NUL \0 inside", "text/plain", "text/plain"},
            {"x", "application/octet-stream", "text/plain"}, // comes as a binary WebSocket message
            {large, "text/plain", "text/plain"},
        };
        for (String[] body : bodies) {
            String id = UUID.randomUUID().toString();
            send(session, destination, body[0], "content-type", body[1], "idempotency-key", id);
            Received received = inbox.next();
            equal(received.body(), body[0], "the body");
            check(String.valueOf(received.headers().getContentType()).startsWith(body[2]), "the content-type of " + body[0]);
            equal(received.headers().getDestination(), destination, "the destination");
            equal(received.headers().getMessageId(), "kim/" + id, "the message-id");
            equal(received.headers().getFirst("from"), "kim", "the sender");
        }
        check(!heard.failure.isDone(), "failed: " + heard.failure.getNow(null));
        session.disconnect();
    }

    private static void acknowledgingMovesTheReadMarker() throws Exception {
        for (String version : List.of("1.2", "1.1")) {
            String room = newRoom();
            StompSession writer = connect(new Heard(), "passcode", otherToken);
            var heard = new Heard();
            StompSession session = connect(heard, "passcode", token, "accept-version", version);
            equal(await(heard.connected).getFirst("version"), version, "the version");
            Inbox inbox = subscribe(session, "/topic/" + room, "ack", "client");
            send(writer, "/topic/" + room, "hello");
            Received received = inbox.next();
            equal(received.headers().getDestination(), "/topic/" + room, "the destination in " + version);
            String id = version.equals("1.2") ? received.headers().getAck() : received.headers().getMessageId();
            session.setAutoReceipt(true);
            var done = new CompletableFuture<Void>();
            session.acknowledge(id, true).addReceiptTask(() -> done.complete(null));
            await(done);
            until("nothing unread in " + version, () -> unreadIs(room, 0));
            writer.disconnect();
            session.disconnect();
        }
    }

    private static void resumesAtCursor() throws Exception {
        String destination = "/topic/" + newRoom();
        StompSession first = connect(new Heard());
        Inbox inbox = subscribe(first, destination);
        for (String body : List.of("one", "two", "three")) send(first, destination, body);
        String cursor = inbox.next().headers().getFirst("cursor");
        first.disconnect();
        StompSession second = connect(new Heard());
        Inbox rest = subscribe(second, destination, "cursor", cursor);
        Inbox all = subscribe(second, destination, "x-stream-offset", "first");
        for (String body : List.of("two", "three")) equal(rest.next().body(), body, "after the cursor");
        for (String body : List.of("one", "two", "three")) equal(all.next().body(), body, "from the first");
        second.disconnect();
    }

    /** `disconnect` closes the connection at once. */
    private static void whatWasSentBeforeTheEndIsStored() throws Exception {
        String destination = "/topic/" + newRoom();
        StompSession reader = connect(new Heard());
        Inbox inbox = subscribe(reader, destination);
        StompSession writer = connect(new Heard());
        for (int number = 0; number < 20; number++) writer.send(destination, String.valueOf(number));
        writer.disconnect();
        for (int number = 0; number < 20; number++) equal(inbox.next().body(), String.valueOf(number), "the body");
        reader.disconnect();
    }

    private static void refusalIsAnErrorFrame() throws Exception {
        var heard = new Heard();
        StompSession session = connect(heard);
        session.subscribe("/queue/lobby", new Inbox());
        check(await(heard.error).getFirst("message") != null, "no message header");
        await(heard.failure);
    }

    private static void heartBeatsKeepASession() throws Exception {
        var heard = new Heard();
        StompSession session = connect(heard, "passcode", token, "heart-beat", "1000,1000");
        // Spring gives up after three intervals without a sign of life, and natter after a few.
        try {
            throw new AssertionError("it ended: " + heard.failure.get(7, TimeUnit.SECONDS));
        } catch (TimeoutException expected) {
            check(session.isConnected(), "it is not connected");
        }
        send(session, "/topic/" + newRoom(), "still here");
        session.disconnect();
    }

    public static void main(String[] arguments) {
        address = arguments[0];
        token = arguments[1];
        otherToken = arguments[2];
        scheduler.initialize();
        int passed = 0;
        int failed = 0;
        record Named(String name, Scenario scenario) {}
        for (Named named : List.of(
            new Named("connects with a token", Stomp::connectsWithToken),
            new Named("a wrong token is an ERROR frame", Stomp::wrongTokenIsAnErrorFrame),
            new Named("messages arrive", Stomp::messagesArrive),
            new Named("acknowledging moves the read marker", Stomp::acknowledgingMovesTheReadMarker),
            new Named("resumes at a cursor", Stomp::resumesAtCursor),
            new Named("what was sent before the end is stored", Stomp::whatWasSentBeforeTheEndIsStored),
            new Named("a refusal is an ERROR frame", Stomp::refusalIsAnErrorFrame),
            new Named("heart-beats keep a session", Stomp::heartBeatsKeepASession))) {
            try {
                named.scenario().run();
                System.out.println("ok    " + named.name());
                passed++;
            } catch (Throwable error) {
                System.out.println("FAIL  " + named.name() + ": " + error);
                error.printStackTrace(System.out);
                failed++;
            }
        }
        System.out.println(passed + " passed, " + failed + " failed");
        System.exit(failed == 0 ? 0 : 1);
    }
}
