"""A server that speaks as Google Cloud Storage does where run folders use it: the XML interface of objects, with generations.

It is no program of Google's, and no other emulator at hand has this interface with conditions: fake-gcs-server takes no puts of it.
It follows what Google documents. Objects are files below FOLDER; a put, a condition and a listing are one step each.

    python3 google.py PORT FOLDER

| request | answer |
|---|---|
| PUT /BUCKET | a new bucket |
| PUT /BUCKET/KEY | 200 with `x-goog-generation`; 412 unless `x-goog-if-generation-match` is that of the object, 0 for none |
| PUT /BUCKET/KEY with `x-goog-copy-source` | a copy with its `x-goog-meta-...` |
| GET, HEAD /BUCKET/KEY | `If-Match`, `If-None-Match`, `Range`; `x-goog-meta-...` as they were given |
| DELETE /BUCKET/KEY | 204, or 404 |
| POST /BUCKET/KEY?uploads, PUT ?partNumber&uploadId, POST ?uploadId, DELETE ?uploadId | an upload in parts |
| GET /BUCKET?list-type=2 | pages of 1,000 keys, with `prefix`, `delimiter`, `continuation-token`; no generations, as at Google |
"""
import hashlib, http.server, itertools, re, sys, threading, urllib.parse
from email.utils import formatdate
from pathlib import Path
from time import gmtime, strftime, time
from xml.sax.saxutils import escape

PAGE = 1000
PIECE = 1 << 20


class Buckets:
    def __init__(self, folder):
        self.folder, self.lock, self.count = folder, threading.Lock(), itertools.count(int(time() * 1e6))
        self.buckets, self.uploads = {}, {}

    def file(self):
        return self.folder / str(next(self.count))


class Object:
    def __init__(self, path, tag, generation, meta):
        self.path, self.tag, self.generation, self.meta = path, tag, generation, meta
        self.size, self.modified = path.stat().st_size, time()


class Refused(Exception):
    def __init__(self, status, code):
        self.status, self.code = status, code


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "loopback"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def take(self):
        """The body, as a file, and its MD5."""
        left, path, digest = int(self.headers.get("Content-Length") or 0), self.server.all.file(), hashlib.md5()
        with open(path, "wb") as out:
            while left:
                piece = self.rfile.read(min(left, PIECE))
                if not piece:
                    path.unlink()
                    raise ConnectionError
                out.write(piece), digest.update(piece)
                left -= len(piece)
        return path, f'"{digest.hexdigest()}"'

    def handle_one(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        bucket, _, key = url.path.lstrip("/").partition("/")
        bucket, key = urllib.parse.unquote(bucket), urllib.parse.unquote(key)
        taken = None
        try:
            if self.command in ("PUT", "POST"):
                taken = self.take()
            with self.server.all.lock:
                result = self.respond(bucket, key, query, taken)
            if result[-1] != "send":
                self.answer(*result)
            else:
                self.send(result)
        except Refused as refused:
            body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{refused.code}</Code><Message>no</Message></Error>"
            self.answer(refused.status, body.encode(), [("Content-Type", "application/xml")])
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

    def respond(self, bucket, key, query, taken):
        every = self.server.all
        if not key and self.command == "PUT":
            every.buckets.setdefault(bucket, {})
            return (200,)
        if bucket not in every.buckets:
            raise Refused(404, "NoSuchBucket")
        objects = every.buckets[bucket]
        if not key:
            if self.command != "GET":
                raise Refused(405, "MethodNotAllowed")
            return self.list(objects, query)
        upload = every.uploads.get(query.get("uploadId"))
        if "uploadId" in query and upload is None:
            raise Refused(404, "NoSuchUpload")
        if self.command == "PUT" and upload:
            upload["parts"][int(query["partNumber"])] = taken
            return 200, b"", [("ETag", taken[1])]
        if self.command == "PUT":
            wanted = self.headers.get("x-goog-if-generation-match")
            there = objects[key].generation if key in objects else 0
            if wanted is not None and wanted != str(there):
                taken[0].unlink()
                raise Refused(412, "PreconditionFailed")
            if source := self.headers.get("x-goog-copy-source"):
                found = every.buckets.get(urllib.parse.unquote(source.lstrip("/").split("/")[0]), {}).get(
                    urllib.parse.unquote(source.lstrip("/").partition("/")[2]))
                if found is None:
                    raise Refused(404, "NoSuchKey")
                taken[0].write_bytes(found.path.read_bytes())
                made = self.put(objects, key, taken[0], found.tag, found.meta)
                return 200, f"<CopyObjectResult><ETag>{escape(made.tag)}</ETag></CopyObjectResult>".encode()
            made = self.put(objects, key, *taken, self.meta())
            return 200, b"", [("ETag", made.tag), ("x-goog-generation", str(made.generation))]
        if self.command == "POST" and "uploads" in query:
            name = hashlib.sha256(f"{key}{next(every.count)}".encode()).hexdigest()
            every.uploads[name] = {"parts": {}, "meta": self.meta()}
            return 200, (f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
                         "</InitiateMultipartUploadResult>").encode()
        if self.command == "POST" and upload:
            return self.complete(objects, bucket, key, query["uploadId"], upload, taken[0].read_text())
        if self.command == "DELETE" and upload:
            del every.uploads[query["uploadId"]]
            return (204,)
        if key not in objects:
            raise Refused(404, "NoSuchKey")
        if self.command == "DELETE":
            objects.pop(key).path.unlink()
            return (204,)
        found, headers = objects[key], self.headers
        if headers.get("If-Match") not in (None, found.tag):
            raise Refused(412, "PreconditionFailed")
        if headers.get("If-None-Match") == found.tag:
            return 304, b"", self.described(found)
        # Open before the lock is let go: another put may replace it.
        return found, open(found.path, "rb"), headers.get("Range"), "send"

    def meta(self):
        return [(name.lower(), value) for name, value in self.headers.items() if name.lower().startswith("x-goog-meta-")]

    def put(self, objects, key, path, tag, meta):
        old = objects.get(key)
        objects[key] = Object(path, tag, next(self.server.all.count), meta)
        if old:
            old.path.unlink()
        return objects[key]

    def complete(self, objects, bucket, key, name, upload, wanted):
        parts = re.findall(r"<PartNumber>(\d+)</PartNumber>", wanted)
        tags = re.findall(r"<ETag>(.*?)</ETag>", wanted)
        have = [upload["parts"].get(int(number)) for number in parts]
        if not parts or [part and part[1] for part in have] != [tag.replace("&quot;", '"') for tag in tags]:
            raise Refused(400, "InvalidPart")
        path, digest = self.server.all.file(), hashlib.md5()
        with open(path, "wb") as out:
            for part, tag in have:
                out.write(part.read_bytes()), digest.update(tag.encode())
        del self.server.all.uploads[name]
        for part, _ in have:
            part.unlink(missing_ok=True)
        made = self.put(objects, key, path, f'"{digest.hexdigest()}-{len(parts)}"', upload["meta"])
        body = (f"<CompleteMultipartUploadResult><Location>l</Location><Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
                f"<ETag>{escape(made.tag)}</ETag></CompleteMultipartUploadResult>")
        return 200, body.encode(), [("x-goog-generation", str(made.generation))]

    def described(self, found):
        return [("ETag", found.tag), ("Last-Modified", formatdate(found.modified, usegmt=True)),
                ("x-goog-generation", str(found.generation)), ("Content-Type", "application/octet-stream"), *found.meta]

    def send(self, result):
        found, file, asked, _ = result
        with file:
            start, end, status, headers = 0, found.size, 200, self.described(found)
            if asked:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                start, end = int(first), min(int(last) + 1 if last else found.size, found.size)
                status = 206
                headers.append(("Content-Range", f"bytes {start}-{end - 1}/{found.size}"))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.flush()
            if start < end:
                self.connection.sendfile(file, start, end - start)

    def list(self, objects, query):
        prefix, delimiter, after = (query.get(name, "") for name in ("prefix", "delimiter", "continuation-token"))
        out, folders, last, more = [], [], "", False
        for key in sorted(key for key in objects if key.startswith(prefix) and key > after):
            rest = key[len(prefix):]
            folder = prefix + rest.split(delimiter)[0] + delimiter if delimiter and delimiter in rest else None
            if folder and folder == (folders or [None])[-1]:
                last = key
                continue
            if len(out) + len(folders) == PAGE:
                more = True
                break
            last = key
            if folder:
                folders.append(folder)
                continue
            found = objects[key]
            when = strftime("%Y-%m-%dT%H:%M:%S.000Z", gmtime(found.modified))
            out.append(f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{escape(found.tag)}</ETag>"
                       f"<Size>{found.size}</Size></Contents>")
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        common = "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        body = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{''.join(out)}{common}{token}</ListBucketResult>"
        return 200, body.encode(), [("Content-Type", "application/xml")]


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def main():
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(("127.0.0.1", port), Handler)
    server.all = Buckets(folder)
    server.serve_forever()


if __name__ == "__main__":
    main()
