"""A proxy that makes faults between a client and a server: every Nth request is answered 500, 503 SlowDown or 412, reset in
the middle, or stalled, in turn. `python3 proxy.py LISTEN_PORT SERVER_PORT N` prints what it did when it gets SIGTERM.
"""
import collections, itertools, signal, socket, struct, sys, threading, time

LISTEN, SERVER, EVERY = (int(arg) for arg in sys.argv[1:4])
CONDITIONS = (b"if-match", b"if-none-match", b"x-goog-if-generation-match")
KINDS = ["500", "503", "reset", "half", "stall", "lost", "412"]
STALL_S = 8
count, kinds, done, lock = itertools.count(1), itertools.cycle(KINDS), collections.Counter(), threading.Lock()


def answer(status, code):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>the proxy says no</Message></Error>".encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body)


def head(stream):
    """The lines of a request or an answer, and its headers."""
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line in (b"\r\n", b"\n"):
            break
    pairs = (line.split(b":", 1) for line in lines[1:] if b":" in line)
    return b"".join(lines), {name.strip().lower(): value.strip() for name, value in pairs}


def copy(source, sink, left):
    while left:
        piece = source.read(min(left, 1 << 20))
        if not piece:
            return False
        if sink:
            sink.sendall(piece)
        left -= len(piece)
    return True


def chunked(source, sink):
    while True:
        line = source.readline()
        sink.sendall(line)
        n = int(line.split(b";")[0] or b"0", 16)
        copy(source, sink, n + 2)
        if n == 0:
            return


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def serve(client):
    server = socket.create_connection(("127.0.0.1", SERVER))
    for side in (client, server):
        side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    from_client, from_server = client.makefile("rb"), server.makefile("rb")
    try:
        while True:
            request, headers = head(from_client)
            if not request.strip():
                return
            length = int(headers.get(b"content-length", 0))
            with lock:
                n = next(count)
                kind = next(kinds) if EVERY and n % EVERY == 0 else None
                # Only a write under a condition fails by one.
                if kind == "412" and not (request.startswith(b"PUT") and any(name in headers for name in CONDITIONS)):
                    kind = "500"
                done[kind or "through"] += 1
            if kind in ("500", "503", "412"):
                copy(from_client, None, length)
                code = {"500": "InternalError", "503": "SlowDown", "412": "PreconditionFailed"}[kind]
                client.sendall(answer(int(kind), code))
                return
            if kind == "reset":
                copy(from_client, None, length // 2)
                return reset(client)
            if kind == "stall":
                time.sleep(STALL_S)
                return
            server.sendall(request)
            if headers.get(b"expect"):
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            copy(from_client, server, length)
            reply, headers = head(from_server)
            while reply.startswith(b"HTTP/1.1 100"):
                reply, headers = head(from_server)
            status = reply.split(b" ")[1]
            empty = request.startswith(b"HEAD ") or status in (b"204", b"304")
            length = 0 if empty else int(headers.get(b"content-length", 0))
            if kind == "lost":
                return reset(client)
            client.sendall(reply)
            if kind == "half":
                copy(from_server, client, length // 2)
                return reset(client)
            if not empty and b"chunked" in headers.get(b"transfer-encoding", b""):
                chunked(from_server, client)
            else:
                copy(from_server, client, length)
            if headers.get(b"connection", b"").lower() == b"close":
                return
    except (OSError, ValueError):
        pass
    finally:
        client.close(), server.close()


def end(*_):
    print(dict(done), flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, end)
listener = socket.create_server(("127.0.0.1", LISTEN), backlog=128)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
