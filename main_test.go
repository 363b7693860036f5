package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"
	"github.com/zishang520/socket.io/servers/engine/v3"
	"github.com/zishang520/socket.io/servers/socket/v3"
	"golang.org/x/sys/unix"
)

// The tests start the daemon on a free port and talk to it over TCP, in frames and requests that they
// write themselves: a client of the same library would share its faults.

// patience is how long a test waits for what has to come.
const patience = 20 * time.Second

const testSecret = "0123456789abcdef0123456789-secret"

// unhurried has no test meet the heartbeat: how long it takes is the machine's business.
const unhurried = "PING_INTERVAL=1h"

// quick is the heartbeat of the public suites.
var quick = []string{"PING_INTERVAL=300ms", "PING_TIMEOUT=200ms"}

const (
	handshakePath = "/socket.io/?EIO=4&transport=polling"
	upgradePath   = "/socket.io/?EIO=4&transport=websocket"
	upgradeHeader = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)

// TestMain lets this binary stand in for the daemon's, for the tests of signals and exit codes.
func TestMain(m *testing.M) {
	switch os.Getenv("RUN_MAIN") {
	case "":
	case "panic":
		defer (&server{log: newLogger(stderr{}, slog.LevelInfo)}).logPanic("panicked")
		panic("TestMain" + strings.Repeat(" ", 10_000))
	case "failing poll": // poll(2) refuses more descriptors than the process may have
		var limit unix.Rlimit
		unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
		unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Max: limit.Max})
		fmt.Fprintln(stderr{}, "TestMain cannot poll")
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		fmt.Fprintln(stderr{}, "TestMain can poll")
		return
	default:
		main()
		return
	}
	// The parallel tests wait and need no CPU of their own. Set before m.Run parses the flags: -parallel still counts, and with
	// -fuzz it is the number of workers.
	if !slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "-test.fuzz=") }) {
		flag.Set("test.parallel", "32")
	}
	os.Exit(m.Run())
}

// daemon is a running one.
type daemon struct {
	t    testing.TB
	addr string
	logs *logs
	stop func() error // ends it and returns what run returned
}

// start runs the daemon until the test ends.
func start(t testing.TB, env ...string) *daemon {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	d := &daemon{t: t, logs: newLogs()}
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, nil, environment(append([]string{"SOCKET_PORT=0"}, env...)), io.Discard, d.logs)
	}()
	d.stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	d.addr = d.logs.wait(t, `msg=listening addr=(\S+)`)[1]
	return d
}

// serve runs a server of which the test wants the inside.
func serve(t testing.TB, env ...string) (*server, *daemon) {
	t.Helper()
	s := newTestServer(t, env...)
	return s, serveOn(t, s)
}

// newTestServer returns a server that takes no connections.
func newTestServer(t testing.TB, env ...string) *server {
	t.Helper()
	cfg, err := loadConfig(environment(env))
	if err != nil {
		t.Fatal(err)
	}
	return newServer(cfg, slog.New(slog.DiscardHandler))
}

// newLoggedServer returns one with a log of what has that level.
func newLoggedServer(t testing.TB, level slog.Level, env ...string) (*server, *logs) {
	t.Helper()
	s, l := newTestServer(t, env...), newLogs()
	s.log = slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: level}))
	return s, l
}

// serveOn has a server take connections.
func serveOn(t testing.TB, s *server) *daemon {
	t.Helper()
	listener, err := listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.http.Serve(listener)
	t.Cleanup(func() { s.http.Close() })
	return &daemon{t: t, addr: listener.Addr().String()}
}

func environment(env []string) func(string) string {
	return func(name string) string {
		for _, e := range slices.Backward(env) {
			if v, ok := strings.CutPrefix(e, name+"="); ok {
				return v
			}
		}
		return ""
	}
}

// logs is a log that can be waited for.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func newLogs() *logs { return &logs{more: make(chan struct{})} }

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.more)
	l.more = make(chan struct{})
	return l.text.Write(b)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// wait returns the submatches of the pattern, once it has a match.
func (l *logs) wait(t testing.TB, pattern string) []string {
	t.Helper()
	re, deadline := regexp.MustCompile(pattern), time.After(patience)
	for {
		l.mu.Lock()
		match, more := re.FindStringSubmatch(l.text.String()), l.more
		l.mu.Unlock()
		if match != nil {
			return match
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("the log has no %q:\n%s", pattern, l)
		}
	}
}

// process runs this test binary as the daemon.
func process(t *testing.T, env ...string) (*exec.Cmd, *logs) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	l := newLogs()
	cmd.Stderr = l
	cmd.Env = append([]string{"RUN_MAIN=1", "SOCKET_PORT=0", "GORACE=atexit_sleep_ms=0"}, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, l
}

// request sends an HTTP request with headers given as "Name: value".
func (d *daemon) request(method, path, body string, headers ...string) (status int, answer string, header http.Header) {
	d.t.Helper()
	req, err := http.NewRequest(method, "http://"+d.addr+path, strings.NewReader(body))
	if err != nil {
		d.t.Fatal(err)
	}
	for _, h := range headers {
		if name, value, ok := strings.Cut(h, ": "); ok {
			req.Header.Add(name, value)
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

// raw opens a connection and writes a request as it stands, with CRLF for each line's end.
func (d *daemon) raw(request string) net.Conn {
	d.t.Helper()
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	io.WriteString(conn, strings.ReplaceAll(request, "\n", "\r\n"))
	return conn
}

// answer reads the answer to one request.
func answer(conn net.Conn) (status int, body string, err error) {
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp.StatusCode, "", nil
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// serveHTTP has the server answer a request that comes by no connection.
func (s *server) serveHTTP(ctx context.Context, method, path, body string) (status int, answer string) {
	w := httptest.NewRecorder()
	s.http.Handler.ServeHTTP(w, localRequest(ctx, method, path, body))
	return w.Code, w.Body.String()
}

func localRequest(ctx context.Context, method, path, body string) *http.Request {
	r := httptest.NewRequestWithContext(ctx, method, path, strings.NewReader(body))
	r.RemoteAddr, r.Host = "127.0.0.1:1", "127.0.0.1"
	return r
}

// broadcast posts to /broadcast and returns delivered.
func (d *daemon) broadcast(body string) int {
	d.t.Helper()
	status, answer, _ := d.request("POST", "/broadcast", body, "Authorization: Bearer "+testSecret)
	var got struct {
		Success   bool
		Delivered *int
	}
	if err := json.Unmarshal([]byte(answer), &got); err != nil || status != 200 || !got.Success || got.Delivered == nil {
		d.t.Fatalf("broadcast %.200s: got %d %s", body, status, answer)
	}
	return *got.Delivered
}

// health returns a number of /health.
func (d *daemon) health(field string) int {
	d.t.Helper()
	_, answer, _ := d.request("GET", "/health", "")
	var got map[string]any
	if err := json.Unmarshal([]byte(answer), &got); err != nil {
		d.t.Fatal(err)
	}
	n, ok := got[field].(float64)
	if !ok {
		d.t.Fatalf("/health has no number %s: %s", field, answer)
	}
	return int(n)
}

// waitHealth waits until /health says so.
func (d *daemon) waitHealth(field string, want int) {
	d.t.Helper()
	eventually(d.t, func() string {
		if got := d.health(field); got != want {
			return fmt.Sprintf("/health: %s is %d, want %d", field, got, want)
		}
		return ""
	})
}

// eventually waits for a state of which no event tells, such as a counter's: until check names no problem.
func eventually(t testing.TB, check func() (problem string)) {
	t.Helper()
	tick, deadline := time.NewTicker(5*time.Millisecond), time.After(patience)
	defer tick.Stop()
	for problem := check(); problem != ""; problem = check() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal(problem)
		}
	}
}

// each runs f for 0 … n-1, at most 100 at a time, and waits for all.
func each(n int, f func(i int)) {
	var wg sync.WaitGroup
	limit := make(chan struct{}, 100)
	for i := range n {
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			f(i)
		})
	}
	wg.Wait()
}

// goroutines waits until there are no more of them than there were, but for a few of net/http's.
func goroutines(t testing.TB, before int) {
	t.Helper()
	eventually(t, func() string {
		http.DefaultClient.CloseIdleConnections()
		n := runtime.NumGoroutine()
		if n <= before+5 {
			return ""
		}
		stacks := make([]byte, 1<<20)
		return fmt.Sprintf("%d goroutines, want the %d from before:\n%.6000s", n, before, stacks[:runtime.Stack(stacks, true)])
	})
}

// liveHeap returns the bytes that are still used after a collection. They may become less than before, too.
func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what had a finalizer goes in the second
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// client is one Engine.IO connection, by either transport.
type client struct {
	t    testing.TB
	d    *daemon
	open string // the OPEN packet's JSON
	sid  string // Engine.IO
	id   string // Socket.IO

	conn     net.Conn // WebSocket
	br       *bufio.Reader
	protocol string // the subprotocol that the server took
	closing  []byte // the payload of the server's close frame

	polled []string // polling: packets fetched and not yet read
}

var transportNames = []string{"websocket", "polling", "upgraded"}

// dial opens a connection and connects it to the namespace.
func (d *daemon) dial(transport string) *client {
	d.t.Helper()
	c := d.handshake(transport)
	c.connect()
	if transport == "upgraded" {
		c.upgrade()
	}
	return c
}

// handshake opens a connection and reads the OPEN packet.
func (d *daemon) handshake(transport string, headers ...string) *client {
	d.t.Helper()
	c := &client{t: d.t, d: d}
	if transport == "websocket" {
		c.dialWebSocket("", headers...)
	}
	c.open = c.expect("0")
	var open struct{ Sid string }
	if err := json.Unmarshal([]byte(c.open), &open); err != nil {
		d.t.Fatal(err)
	}
	c.sid = open.Sid
	return c
}

// dialWebSocket opens a WebSocket, for the session sid if it is one.
func (c *client) dialWebSocket(sid string, headers ...string) {
	c.t.Helper()
	status := c.tryWebSocket(sid, headers...)
	if status != 101 {
		c.t.Fatalf("WebSocket handshake: got status %d", status)
	}
}

func (c *client) tryWebSocket(sid string, headers ...string) (status int) {
	c.t.Helper()
	conn, err := net.Dial("tcp", c.d.addr)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	path := "/socket.io/?EIO=4&transport=websocket"
	if sid != "" {
		path += "&sid=" + sid
	}
	key := make([]byte, 16)
	rand.Read(key)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n",
		path, c.d.addr, base64.StdEncoding.EncodeToString(key))
	for _, h := range headers {
		if h != "" {
			fmt.Fprintf(conn, "%s\r\n", h)
		}
	}
	io.WriteString(conn, "\r\n")
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	if resp.StatusCode == 101 {
		hash := sha1.Sum([]byte(base64.StdEncoding.EncodeToString(key) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
		if got, want := resp.Header.Get("Sec-WebSocket-Accept"), base64.StdEncoding.EncodeToString(hash[:]); got != want {
			c.t.Errorf("Sec-WebSocket-Accept: got %q, want %q", got, want)
		}
		c.conn, c.br, c.protocol = conn, br, resp.Header.Get("Sec-WebSocket-Protocol")
	}
	return resp.StatusCode
}

// connect joins the namespace and learns the Socket.IO id.
func (c *client) connect() {
	c.t.Helper()
	c.send("40")
	var ack struct{ Sid string }
	if err := json.Unmarshal([]byte(c.expect("40")), &ack); err != nil {
		c.t.Fatal(err)
	}
	c.id = ack.Sid
}

// upgrade moves a polling client to WebSocket, as socket.io-client does: probe, let the poll end, UPGRADE.
func (c *client) upgrade() {
	c.t.Helper()
	unread := c.polled
	c.polled = nil
	var left []string
	ended := make(chan struct{})
	go func() { // the poll that is under way until the daemon ends it
		defer close(ended)
		_, answer, err := c.poll()
		if err != nil {
			c.t.Errorf("poll while upgrading: %v", err)
		}
		left = strings.Split(answer, "\x1e")
	}()
	c.dialWebSocket(c.sid)
	c.send("2probe")
	c.expect("3probe")
	<-ended
	c.polled = append(unread, slices.DeleteFunc(left, func(packet string) bool { return packet == "6" })...)
	c.send("5")
}

func (c *client) url() string {
	return "http://" + c.d.addr + "/socket.io/?EIO=4&transport=polling&sid=" + c.sid
}

func (c *client) poll() (status int, answer string, err error) {
	url := c.url()
	if c.sid == "" {
		url = strings.TrimSuffix(url, "&sid=")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// send sends one Engine.IO packet.
func (c *client) send(packet string) {
	c.t.Helper()
	if c.conn != nil {
		if err := c.write(0x81, packet); err != nil {
			c.t.Fatalf("send %.100s: %v", packet, err)
		}
		return
	}
	if status, answer := c.post(packet); status != 200 || answer != "ok" {
		c.t.Fatalf("post %.100s: got %d %s", packet, status, answer)
	}
}

// sendAll sends packets at once: by polling in one payload. What begins with a byte below a space is binary.
func (c *client) sendAll(packets ...string) {
	c.t.Helper()
	var payload []string
	var frames bytes.Buffer
	for _, p := range packets {
		kind := byte(0x81)
		if p != "" && p[0] < ' ' {
			kind = 0x82
			payload = append(payload, "b"+base64.StdEncoding.EncodeToString([]byte(p)))
		} else {
			payload = append(payload, p)
		}
		frames.Write(masked(kind, p))
	}
	if c.conn == nil {
		if status, answer := c.post(strings.Join(payload, "\x1e")); status != 200 || answer != "ok" {
			c.t.Fatalf("post %.200q: got %d %s", packets, status, answer)
		}
	} else if _, err := c.conn.Write(frames.Bytes()); err != nil {
		c.t.Fatal(err)
	}
}

// write sends one WebSocket frame with that first byte.
func (c *client) write(first byte, payload string) error {
	c.conn.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.conn.Write(masked(first, payload))
	return err
}

// masked is a WebSocket frame of a client, masked with zeros.
func masked(first byte, payload string) []byte {
	b := []byte{first, 0x80 | byte(len(payload))}
	if n := len(payload); n >= 1<<16 {
		b[1] = 0x80 | 127
		b = binary.BigEndian.AppendUint64(b, uint64(n))
	} else if n >= 126 {
		b[1] = 0x80 | 126
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

func (c *client) post(payload string) (status int, answer string) {
	c.t.Helper()
	resp, err := http.Post(c.url(), "text/plain;charset=UTF-8", strings.NewReader(payload))
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// next returns the next packet, and answers the heartbeat on the way. Its error is the end of the connection.
func (c *client) next() (string, error) {
	for {
		packet, err := c.nextPacket()
		if err != nil || packet != "2" {
			return packet, err
		}
		c.send("3")
	}
}

func (c *client) nextPacket() (string, error) {
	for len(c.polled) == 0 {
		if c.conn != nil {
			return c.readFrame()
		}
		status, answer, err := c.poll()
		if err != nil {
			return "", err
		}
		if status != 200 {
			return "", fmt.Errorf("poll: got %d %s", status, answer)
		}
		c.polled = strings.Split(answer, "\x1e")
	}
	packet := c.polled[0]
	c.polled = c.polled[1:]
	return packet, nil
}

// readFrame returns the next text frame's payload; io.EOF after a close frame.
func (c *client) readFrame() (string, error) {
	c.conn.SetReadDeadline(time.Now().Add(patience))
	header := make([]byte, 2)
	if _, err := io.ReadFull(c.br, header); err != nil {
		return "", err
	}
	length := uint64(header[1])
	if extended := map[byte]int{126: 2, 127: 8}[header[1]]; extended > 0 {
		b := make([]byte, 8)
		if _, err := io.ReadFull(c.br, b[8-extended:]); err != nil {
			return "", err
		}
		length = binary.BigEndian.Uint64(b)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(c.br, payload); err != nil {
		return "", err
	}
	switch header[0] {
	case 0x81:
		return string(payload), nil
	case 0x88:
		c.closing = payload
		return "", io.EOF
	default:
		return "", fmt.Errorf("frame of kind %#x", header[0])
	}
}

// expect returns the rest of the next packet, which has to begin with prefix.
func (c *client) expect(prefix string) string {
	c.t.Helper()
	packet, err := c.next()
	if err != nil {
		c.t.Fatalf("waiting for %q: %v", prefix, err)
	}
	rest, ok := strings.CutPrefix(packet, prefix)
	if !ok {
		c.t.Fatalf("got %.300s, want %s…", packet, prefix)
	}
	return rest
}

// expectEnd reads until the connection ends.
func (c *client) expectEnd() {
	c.t.Helper()
	for {
		packet, err := c.next()
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
			c.t.Fatalf("the connection did not end: %v", err)
		}
		if err != nil || packet == "1" {
			return
		}
	}
}

// gone reads until the connection ends, and then leaves too: a WebSocket keeps its place for closeTimeout otherwise.
func (c *client) gone() {
	c.t.Helper()
	c.expectEnd()
	if c.conn != nil {
		c.conn.Close()
	}
}

// end closes the connection as a page does that goes away: of a polling client's, the last poll is let go.
func (c *client) end() {
	c.t.Helper()
	if c.conn != nil {
		c.conn.Close()
	} else if status, _ := c.post("1"); status == 200 {
		c.poll()
	}
}

// emit sends an event.
func (c *client) emit(event string, args ...string) {
	c.t.Helper()
	c.send("42" + eventJSON(event, args))
}

// call sends an event, and returns the answering event and the acknowledgement.
func (c *client) call(event string, args ...string) (answer, ack string) {
	c.t.Helper()
	c.send("427" + eventJSON(event, args))
	answer = c.expect("42")
	return answer, c.expect("437")
}

func eventJSON(event string, args []string) string {
	return `["` + event + `"` + strings.Join(append([]string{""}, args...), ",") + `]`
}

// join joins a session, signed where the daemon has testSecret, and waits for the answer.
func (c *client) join(session string) {
	c.t.Helper()
	c.emit("join-session", fmt.Sprintf(`{"sessionId":%q,"auth":%q}`, session, sign(testSecret, c.id, "chat-session."+session)))
	c.expect(`42["joined-session"`)
}

func (c *client) joinAdmin() {
	c.t.Helper()
	c.emit("join-admin", fmt.Sprintf(`{"auth":%q}`, sign(testSecret, c.id, "admin-chat")))
	c.expect(`42["joined-admin"`)
}

// joinChannel joins a channel by its name, signed where the daemon has testSecret, and waits for the answer.
func (c *client) joinChannel(channel string) {
	c.t.Helper()
	signed := channel
	if plain := strings.TrimPrefix(channel, "private-"); plain == "admin-chat" || strings.HasPrefix(plain, "chat-session.") {
		signed = plain
	}
	c.emit("join", fmt.Sprintf(`{"channel":%q,"auth":%q}`, channel, sign(testSecret, c.id, signed)))
	c.expect(`42["joined",{"channel":"` + channel + `"}]`)
}

func sign(secret, id, channel string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	io.WriteString(mac, id+":"+channel)
	return hex.EncodeToString(mac.Sum(nil))
}

// expectNothing proves that nothing is on its way to a client in that session: a marker sent now comes next.
func (c *client) expectNothing(session string) {
	c.t.Helper()
	c.d.broadcast(fmt.Sprintf(`{"channel":"chat-session.%s","event":"marker"}`, session))
	c.expect(`42["marker",{}]`)
}

// fill broadcasts to a session, in which a client is alone, more than what the kernel takes for a client that does not read:
// whatever comes next waits in the client's queue. All at once, since stallTimeout begins with the first.
func (d *daemon) fill(c *client, session string) {
	d.t.Helper()
	if c.conn != nil {
		c.conn.(*net.TCPConn).SetReadBuffer(readBuffer)
	}
	body := `{"channel":"chat-session.` + session + `","event":"fill","data":"` + strings.Repeat("x", 100_000) + `"}`
	each(filling, func(int) {
		if n := d.broadcast(body); n != 1 {
			d.t.Errorf("delivered %d, want 1", n)
		}
	})
}

// filling is how many broadcasts fill makes: of 500 KB in all, which is twice what the kernel takes.
const filling = 5

func (c *client) expectFilling() {
	c.t.Helper()
	for range filling {
		c.expect(`42["fill","xxx`)
	}
}

// Deploy: the process, its signals, systemd, and the log

func TestExitOnBadStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for env, want := range map[string]string{
		"SOCKET_PORT=" + port: "socketio: listen tcp 127.0.0.1:" + port + ": bind: address already in use\n",
		"SOCKET_PORT=abc":     "socketio: SOCKET_PORT: \"abc\" is not a port (0–65535)\n",
	} {
		cmd, l := process(t, env)
		err := cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 1 || l.String() != want {
			t.Errorf("%s: got exit code %d (%v) and %q, want 1 and %q", env, code, err, l, want)
		}
	}
}

// TestArguments: there is one, and it prints the version.
func TestArguments(t *testing.T) {
	t.Parallel()
	const refusal = "socketio: it takes no arguments but --version: the environment configures it, see the README's Configuration\n"
	for _, tt := range []struct {
		args           []string
		code           int
		stdout, stderr string
	}{
		{[]string{"--version"}, 0, "socketio dev\n", ""},
		{[]string{"--help"}, 1, "", refusal},
		{[]string{"serve"}, 1, "", refusal},
		{[]string{"--version", "--version"}, 1, "", refusal},
		{[]string{""}, 1, "", refusal},
	} {
		cmd := exec.Command(os.Args[0], tt.args...)
		cmd.Env = []string{"RUN_MAIN=1", "SOCKET_PORT=no port", "GORACE=atexit_sleep_ms=0"} // a bad environment does not matter
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code != tt.code || stdout.String() != tt.stdout || stderr.String() != tt.stderr {
			t.Errorf("%q: got exit code %d, %q and %q", tt.args, code, &stdout, &stderr)
		}
	}
}

// TestStop holds a WebSocket client, one that does not answer the close, and a poll that waits.
func TestStop(t *testing.T) {
	signals := []os.Signal{syscall.SIGTERM, os.Interrupt}
	each(len(signals), func(i int) {
		sig := signals[i]
		cmd, l := process(t)
		d := &daemon{t: t, addr: l.wait(t, `msg=listening addr=(\S+)`)[1]}
		ws, poller, idle := d.dial("websocket"), d.dial("polling"), d.dial("websocket")
		polled := make(chan error, 1)
		go func() {
			packet, err := poller.next()
			if err == nil && packet != "1" {
				err = fmt.Errorf("got %q", packet)
			}
			polled <- err
		}()
		late := d.slowPost(`{"channel":"admin-chat","event":"e"}`)
		cmd.Process.Signal(sig)
		if packet, err := ws.next(); err != io.EOF {
			t.Errorf("%v: got %q, %v, want a close frame", sig, packet, err)
		}
		if want := []byte{1001 >> 8, 1001 & 0xff}; !bytes.Equal(ws.closing, want) {
			t.Errorf("%v: close frame: got % x, want % x", sig, ws.closing, want)
		}
		if err := <-polled; err != nil {
			t.Errorf("%v: the poll that waited has to end with CLOSE: %v", sig, err)
		}
		// idle has not answered the close frame: the daemon waits closeTimeout for it.
		for _, tt := range []struct{ method, path, want string }{
			{"GET", "/health", `"status":"stopping"`},
			{"POST", "/broadcast", `{"error":"the server is stopping","success":false}`},
			{"GET", "/socket.io/?EIO=4&transport=polling", "the server is stopping"},
		} {
			status, answer, header := d.request(tt.method, tt.path, `{"channel":"admin-chat","event":"e"}`)
			if status != 503 || !strings.Contains(answer, tt.want) || (tt.path != "/health" && header.Get("Retry-After") != "1") {
				t.Errorf("%v: %s while stopping: got %d %s %v", sig, tt.path, status, answer, header)
			}
		}
		if status := late(); status != 503 { // it came in time, but its message would not arrive
			t.Errorf("%v: a broadcast under way: got %d, want 503", sig, status)
		}
		stopped := time.Now()
		idle.expectEnd()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %v, want exit code 0", sig, err)
		}
		if took := time.Since(stopped); took > stopTimeout {
			t.Errorf("%v: the process took %v to end, want at most %v", sig, took, stopTimeout)
		}
	})
}

// slowPost sends a request to /broadcast but for the end of its body, and returns what sends that and reads the status.
func (d *daemon) slowPost(body string) func() (status int) {
	d.t.Helper()
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "POST /broadcast HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n%s", len(body), body[:1])
	br := bufio.NewReader(conn)
	if line, err := br.ReadString('\n'); err != nil || !strings.Contains(line, "100 Continue") { // the handler reads the body
		d.t.Fatalf("got %q, %v", line, err)
	}
	return func() int {
		io.WriteString(conn, body[1:])
		br.ReadString('\n')
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			d.t.Fatal(err)
		}
		return resp.StatusCode
	}
}

// stopTimeout is how long the unit lets the daemon take to end (TimeoutStopSec), before systemd kills it.
const stopTimeout = 5 * time.Second

// ends wants a process to end with exit code 0 at SIGTERM, within stopTimeout.
func ends(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	began := time.Now()
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil || time.Since(began) > stopTimeout {
		t.Errorf("ended after %v: %v, want exit code 0 within %v", time.Since(began), err, stopTimeout)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	cmd, l := process(t)
	d := &daemon{t: t, addr: l.wait(t, `msg=listening addr=(\S+)`)[1]}
	d.dial("websocket") // keeps the daemon waiting: it does not answer the close frame
	cmd.Process.Signal(syscall.SIGTERM)
	l.wait(t, "msg=stopping")
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	for done := false; !done; { // the first one's handler may not be gone yet
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			done = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGTERM {
		t.Errorf("got %v, want an end by SIGTERM", cmd.ProcessState)
	}
}

// TestHangup: SIGHUP ends the daemon at once, as a closed terminal does, unless it was started by nohup.
func TestHangup(t *testing.T) {
	t.Parallel()
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP) // where these tests were started by nohup, the daemon would be, too
	defer signal.Stop(hangups)
	for name, script := range map[string]string{"nohup": `trap "" HUP && exec "$0"`, "a terminal": `exec "$0"`} {
		cmd := exec.Command("sh", "-c", script, os.Args[0])
		l := newLogs()
		cmd.Stderr = l
		cmd.Env = []string{"RUN_MAIN=1", "SOCKET_PORT=0", "GORACE=atexit_sleep_ms=0"}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		d := &daemon{t: t, addr: l.wait(t, `msg=listening addr=(\S+)`)[1]}
		cmd.Process.Signal(syscall.SIGHUP)
		if name == "nohup" {
			d.dial("websocket").join("5") // it goes on
			ends(t, cmd)
			if strings.Count(l.String(), "msg=stopping") != 1 {
				t.Errorf("the log:\n%s", l)
			}
			continue
		}
		cmd.Wait()
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGHUP {
			t.Errorf("got %v, want an end by SIGHUP", cmd.ProcessState)
		}
	}
}

// TestStopLosesNothing stops the daemon while messages go to 60 clients: what is answered 200 reaches all of them.
func TestStopLosesNothing(t *testing.T) {
	d := start(t)
	clients := make([]*client, 60)
	each(len(clients), func(i int) {
		clients[i] = d.dial(transportNames[i%3])
		clients[i].join("5")
	})
	heard := make([]int, len(clients))
	var all sync.WaitGroup
	for i, c := range clients {
		all.Go(func() { // reads all the time, as pages do: what is on its way at the end has closeTimeout
			for ; ; heard[i]++ {
				packet, err := c.next()
				if err != nil || packet == "1" {
					return
				}
				if want := fmt.Sprintf(`42["n",[%d,`, heard[i]); !strings.HasPrefix(packet, want) {
					t.Errorf("client %d (%s): got %.50s, want %s", i, transportNames[i%3], packet, want)
					return
				}
			}
		})
	}
	accepted := make(chan int)
	posted := make(chan struct{}, 1000)
	go func() {
		n := 0
		for ; ; n++ {
			resp, err := http.Post("http://"+d.addr+"/broadcast", "application/json",
				strings.NewReader(fmt.Sprintf(`{"channel":"chat-session.5","event":"n","data":[%d,"%s"]}`, n, strings.Repeat("x", 10_000))))
			if err != nil {
				break
			}
			answer, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != 200 {
				break
			}
			if !strings.Contains(string(answer), `"delivered":60,`) {
				t.Errorf("message %d: got %s, want delivered 60", n, answer)
			}
			posted <- struct{}{}
		}
		accepted <- n
	}()
	for range 20 {
		<-posted
	}
	if err := d.stop(); err != nil {
		t.Error(err)
	}
	messages := <-accepted
	all.Wait()
	for i, n := range heard {
		if n != messages {
			t.Errorf("client %d (%s): got %d messages, want %d", i, transportNames[i%3], n, messages)
		}
	}
}

// TestNotify plays systemd: the daemon says that it serves, then that it lives, then that it stops.
func TestNotify(t *testing.T) {
	t.Parallel()
	systemd, path := notifySocket(t)
	next := func() string {
		t.Helper()
		return nextNotify(t, systemd)
	}
	d := start(t, "NOTIFY_SOCKET="+path)
	if got, want := next(), "READY=1\nWATCHDOG=1\nSTATUS=0 connections"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	d.dial("websocket").join("5")
	began := time.Now()
	if got, want := next(), "READY=1\nWATCHDOG=1\nSTATUS=1 connections"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if took := time.Since(began); took > notifyInterval+patience/4 {
		t.Errorf("the second report came after %v, want %v", took, notifyInterval)
	}
	if got := d.health("sessions"); got != 1 {
		t.Errorf("the self-check shows in /health: %d sessions, want 1", got)
	}
	go d.stop()
	if got := next(); got != "STOPPING=1" {
		t.Errorf("got %q, want STOPPING=1", got)
	}
}

// notifySocket plays systemd.
func notifySocket(t *testing.T) (systemd *net.UnixConn, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { systemd.Close() })
	return systemd, path
}

// nextNotify returns what the daemon says next to systemd.
func nextNotify(t *testing.T, systemd *net.UnixConn) string {
	t.Helper()
	systemd.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 4096)
	n, err := systemd.Read(b)
	if err != nil {
		t.Error(err)
	}
	return string(b[:n])
}

// TestSelfCheck finds a daemon whose listener does not answer, or whose rooms are locked for ever.
func TestSelfCheck(t *testing.T) {
	s, d := serve(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.selfCheck(ctx, d.addr); err != nil {
		t.Errorf("healthy: %v", err)
	}
	if err := s.selfCheck(ctx, "127.0.0.1:1"); err == nil {
		t.Error("no listener: got no error")
	}
	s.hub.mu.Lock() // a broadcast that never ends
	soon, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	checked := make(chan error, 1)
	go func() { checked <- s.selfCheck(soon, d.addr) }()
	select {
	case err := <-checked:
		if err == nil {
			t.Error("wedged: the check passed")
		}
	case <-time.After(300 * time.Millisecond): // hangs, and so says nothing to the watchdog
	}
	s.hub.mu.Unlock()
}

// TestFileLimit: connections that wait for nothing, and clients, leave some files to the self-check and to Laravel.
func TestFileLimit(t *testing.T) {
	t.Parallel()
	const warning = `level=WARN msg="file limit too low for MAX_CONNECTIONS: raise LimitNOFILE= in socketio.service, or ulimit -n"`
	cmd, d := limited(t, 256, "MAX_CONNECTIONS=100", "LOG_LEVEL=info")
	if d.dial("websocket"); strings.Contains(d.logs.String(), "file limit") {
		t.Errorf("256 files are enough for 100 connections:\n%s", d.logs)
	}
	ends(t, cmd)

	const files, most = 60, 45
	clients := func(d *daemon, want int) {
		began := time.Now()
		accepted := 0
		for range 52 {
			c := &client{t: t, d: d}
			if c.tryWebSocket("") == 101 {
				c.expect("0{")
				c.connect()
				c.join("5") // or a later one displaces it
				accepted++
			}
		}
		if slow := time.Since(began) > requestTimeout/2; !slow && (accepted < want-5 || accepted > want) { // or the requests have ended
			t.Errorf("%d of 52 clients were let in, want %d", accepted, want)
		}
	}
	var all sync.WaitGroup
	for name, load := range map[string]func(d *daemon){
		"100 idle connections": func(d *daemon) {
			for range 100 {
				if status, _, err := answer(d.raw("GET /health HTTP/1.1\nHost: 127.0.0.1\n\n")); err != nil || status != 200 {
					t.Fatalf("a connection that is kept alive: got %d, %v", status, err)
				}
			}
		},
		"52 clients": func(d *daemon) { clients(d, most) },
		"52 clients beside requests": func(d *daemon) {
			for range 25 {
				d.raw("POST /broadcast HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 5\n\n")
			}
			clients(d, most-25)
		},
	} {
		systemd, path := notifySocket(t)
		_, d := limited(t, files, "MAX_CONNECTIONS=10000", "NOTIFY_SOCKET="+path, unhurried)
		d.logs.wait(t, warning+` limit=60 want=10064 max_connections=45`)
		nextNotify(t, systemd) // at the start; the next comes after notifyInterval
		load(d)
		all.Go(func() {
			if got := nextNotify(t, systemd); !strings.Contains(got, "WATCHDOG=1") {
				t.Errorf("%s: got %q, want WATCHDOG=1", name, got)
			}
			if status, answer, err := d.postAlone(`{"channel":"admin-chat","event":"e"}`); status != 200 {
				t.Errorf("%s: Laravel's post: got %d %s, %v", name, status, answer, err)
			}
			if l := d.logs.String(); strings.Contains(l, "too many open files") || strings.Contains(l, "self-check failed") {
				t.Errorf("%s: the log:\n%.3000s", name, l)
			}
		})
	}
	all.Wait()
}

// limited runs the daemon as a process with so many files. Its own are in the number.
func limited(t *testing.T, files int, env ...string) (*exec.Cmd, *daemon) {
	t.Helper()
	cmd := exec.Command("sh", "-c", fmt.Sprintf("ulimit -n %d && exec %s", files, os.Args[0]))
	l := newLogs()
	cmd.Stderr = l
	cmd.Env = append([]string{"RUN_MAIN=1", "SOCKET_PORT=0", "GORACE=atexit_sleep_ms=0"}, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd, &daemon{t: t, addr: l.wait(t, `msg=listening addr=(\S+)`)[1], logs: l}
}

// postAlone posts to /broadcast by a connection of its own, as PHP does.
func (d *daemon) postAlone(body string) (status int, reply string, err error) {
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "POST /broadcast HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", testSecret, len(body), body)
	return answer(conn)
}

// TestQuietLog runs the daemon as a process: the library prints to its stderr, past the log.
func TestQuietLog(t *testing.T) {
	_, l := process(t, "SOCKETIO_SECRET="+testSecret, "PING_INTERVAL=100ms", "PING_TIMEOUT=100ms", "MAX_CONNECTIONS=40", "TERM=xterm-256color")
	d := &daemon{t: t, addr: l.wait(t, `msg=listening addr=(\S+)`)[1]}
	began := time.Now()
	for range 8 {
		for _, packet := range hostilePackets {
			c := &client{t: t, d: d}
			if c.tryWebSocket("") != 101 {
				continue
			}
			c.conn.Write(slices.Concat(masked(0x81, "40"), masked(0x81, packet), masked(0x82, packet)))
			c.conn.Close()
		}
		d.request("GET", handshakePath, "", "Origin: https://evil.example/"+strings.Repeat("x", maxHeader-1000))
		d.request("GET", handshakePath+";a=b;c", "")
		d.request("POST", "/broadcast", "{}")
		d.request("POST", "/broadcast", "\xff{", "Authorization: Bearer "+testSecret)
		for _, request := range []string{"\x16\x03\x01", "GET\n\n", "GET / HTTP/9.9\n\n", "GET /health HTTP/1.1\nHost: localhost\nX: " + strings.Repeat("x", 2*maxHeader) + "\n\n", "PRI * HTTP/2.0\n\nSM\n\n"} {
			d.raw(request).Close()
		}
	}
	lines := make(map[string]int)
	seconds := int(time.Since(began)/time.Second) + 2
	for line := range strings.Lines(l.String()) {
		message := regexp.MustCompile(`^time=\S+ level=\S+ msg=("[^"]*"|\S+)`).FindStringSubmatch(line)
		if message == nil {
			t.Fatalf("a line that is not the log's:\n%.2000s", l)
		}
		if len(line) > 1000 {
			t.Errorf("a line of %d bytes: %.200s", len(line), line)
		}
		lines[message[1]]++
	}
	for message, n := range lines {
		if n > seconds {
			t.Errorf("%s: %d lines in %d s", message, n, seconds)
		}
	}
	if len(lines) < 3 {
		t.Errorf("only %v: the warnings are missing", slices.Collect(maps.Keys(lines)))
	}
}

// TestServerErrorsAreThrottled: net/http's messages name ports and delays, but are one cause.
func TestServerErrorsAreThrottled(t *testing.T) {
	l := newLogs()
	s := newServer(config{}, slog.New(&throttledHandler{Handler: slog.NewTextHandler(l, nil), last: make(map[string]time.Time)}))
	for i := range 100 {
		s.http.ErrorLog.Printf("http: Accept error: accept tcp 127.0.0.1:3001: too many open files; retrying in %dms", i)
	}
	if n := strings.Count(l.String(), "\n"); n != 1 || !strings.Contains(l.String(), "too many open files") {
		t.Errorf("got %d lines, want 1:\n%.500s", n, l)
	}
}

// TestDisconnects: at debug the log says of each end why, in Socket.IO's words.
func TestDisconnects(t *testing.T) {
	t.Parallel()
	d, impatient := start(t, "LOG_LEVEL=debug", unhurried), start(t, "LOG_LEVEL=debug", "PING_INTERVAL=1s", "PING_TIMEOUT=15s")
	type leaver struct {
		*client
		reason string
	}
	var left []leaver
	for _, transport := range transportNames {
		for reason, leave := range map[string]func(c *client){
			"transport close": func(c *client) { c.end() },
			"client namespace disconnect": func(c *client) {
				c.send("41")
				c.end()
			},
			"parse error":         func(c *client) { c.send("42{}") },
			"forced server close": func(c *client) { c.sendAll(slices.Repeat([]string{"3"}, 2*messageBurst)...) },
		} {
			c := d.dial(transport)
			leave(c)
			left = append(left, leaver{c, reason})
		}
		left = append(left, leaver{impatient.dial(transport), "ping timeout"})
	}
	for _, c := range left {
		c.d.logs.wait(t, fmt.Sprintf(`level=DEBUG msg=disconnected id=%s addr=127.0.0.1 reason="%s"`, c.id, c.reason))
	}
	for _, c := range left {
		c.d.waitHealth("connections", 0)
		if n := strings.Count(c.d.logs.String(), "msg=disconnected id="+c.id); n != 1 {
			t.Errorf("%s: %d lines", c.reason, n)
		}
	}
	d.logs.wait(t, `level=WARN msg="client ended: it sends too many messages" addr=127.0.0.1`)
	c := d.dial("websocket")
	d.stop()
	d.logs.wait(t, `level=DEBUG msg=disconnected id=`+c.id+` addr=127.0.0.1 reason="server shutting down"`)
}

// TestJournalDied: a write to a pipe that nobody reads any more raises SIGPIPE.
func TestJournalDied(t *testing.T) {
	t.Parallel()
	cmd, d, r, w := pipedProcess(t, false)
	r.Close()
	w.Close()
	for _, transport := range transportNames { // each logs a few lines
		c := d.dial(transport)
		c.join("5")
		if n := d.broadcast(`{"channel":"chat-session.5","event":"e"}`); n == 0 {
			t.Errorf("%s: delivered to nobody", transport)
		}
		c.expect("42" + `["e",{}]`)
	}
	ends(t, cmd)
}

// pipedProcess runs the daemon with a pipe for stderr, or a socket as systemd's, and returns both of its ends.
func pipedProcess(t *testing.T, isSocket bool, env ...string) (cmd *exec.Cmd, d *daemon, r, w *os.File) {
	t.Helper()
	r, w = pipe(t, isSocket)
	cmd = exec.Command(os.Args[0])
	cmd.Stderr = w
	cmd.Env = append([]string{"RUN_MAIN=1", "SOCKET_PORT=0", "LOG_LEVEL=debug", "GORACE=atexit_sleep_ms=0"}, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var log []byte
	for {
		b := make([]byte, 4096)
		n, err := r.Read(b)
		log = append(log, b[:n]...)
		if addr := regexp.MustCompile(`msg=listening addr=(\S+) `).FindSubmatch(log); addr != nil {
			return cmd, &daemon{t: t, addr: string(addr[1])}, r, w
		}
		if err != nil {
			t.Fatalf("got %q, %v", log, err)
		}
	}
}

func pipe(t *testing.T, isSocket bool) (r, w *os.File) {
	t.Helper()
	var ends [2]int
	err := unix.Pipe(ends[:])
	if isSocket {
		unix.Close(ends[0])
		unix.Close(ends[1])
		ends, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	unix.CloseOnExec(ends[0])
	unix.CloseOnExec(ends[1])
	r, w = os.NewFile(uintptr(ends[0]), "r"), os.NewFile(uintptr(ends[1]), "w")
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// fillPipe writes until there is no room: whole pages, or the last one would have some.
func fillPipe(t *testing.T, w *os.File) {
	t.Helper()
	fd := int(w.Fd())
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
		if n == 0 && err == nil {
			return
		}
		if _, err = unix.Write(fd, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
	}
}

// drain returns what a pipe has.
func drain(t *testing.T, r *os.File) string {
	t.Helper()
	fd := int(r.Fd())
	var text []byte
	for {
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); n == 0 || err != nil {
			return string(text)
		}
		b := make([]byte, 64<<10)
		n, err := unix.Read(fd, b)
		if err != nil || n == 0 {
			t.Fatalf("got %d, %v", n, err)
		}
		text = append(text, b[:n]...)
	}
}

// TestFullLog: what nobody reads, the daemon does not wait for.
func TestFullLog(t *testing.T) {
	t.Parallel()
	for _, isSocket := range []bool{false, true} {
		name := map[bool]string{false: "a pipe", true: "a socket"}[isSocket]
		cmd, d, _, w := pipedProcess(t, isSocket, "SOCKETIO_SECRET="+testSecret)
		fillPipe(t, w)
		for range 3 {
			if status, answer, _ := d.request("POST", "/broadcast", `{}`, "Authorization: Bearer wrong"); status != 401 {
				t.Errorf("%s: a wrong token: got %d %s", name, status, answer)
			}
			if status, answer, _ := d.request("GET", handshakePath, "", "Origin: https://evil.example"); status != 403 {
				t.Errorf("%s: a foreign origin: got %d %s", name, status, answer)
			}
			c := d.dial("websocket") // whose packets are logged at debug
			c.join("5")
			if n := d.broadcast(`{"channel":"chat-session.5","event":"e"}`); n != 1 {
				t.Errorf("%s: delivered %d, want 1", name, n)
			}
			c.expect(`42["e",{}]`)
			c.send("4") // which ends it
			c.gone()
			d.waitHealth("connections", 0)
		}
		slow := d.dial("websocket")
		slow.join("5")
		for d.health("dropped") == 0 { // until it is cut off
			d.broadcast(`{"channel":"chat-session.5","event":"e","data":"` + strings.Repeat("x", 500_000) + `"}`)
		}
		d.waitHealth("connections", 0)
		ends(t, cmd)
	}
}

// TestFullLogAtTheEnd: nothing waits for the last line of a start that fails, nor for the stack of a panic, longer than a write;
// nor where poll(2) fails, and what is logged behind that is logged.
func TestFullLogAtTheEnd(t *testing.T) {
	t.Parallel()
	for _, isSocket := range []bool{false, true} {
		for mode, want := range map[string]int{"1": 1, "panic": 0, "failing poll": 0} {
			r, w := pipe(t, isSocket)
			for _, state := range []string{"full", "a page is free", "empty"} {
				if state != "empty" {
					fillPipe(t, w)
				}
				if state == "a page is free" { // for more than that a write waits
					if n, err := io.ReadFull(r, make([]byte, 4096)); err != nil {
						t.Fatalf("got %d, %v", n, err)
					}
				}
				cmd := exec.Command(os.Args[0])
				cmd.Env = []string{"RUN_MAIN=" + mode, "SOCKET_PORT=no port", "GORACE=atexit_sleep_ms=0"}
				cmd.Stderr = w
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- cmd.Wait() }()
				select {
				case <-ended:
				case <-time.After(patience):
					cmd.Process.Kill()
					t.Errorf("RUN_MAIN=%s, a socket: %v, %s: it waits", mode, isSocket, state)
					<-ended
				}
				if code := cmd.ProcessState.ExitCode(); code != want {
					t.Errorf("RUN_MAIN=%s: got exit code %d, want %d", mode, code, want)
				}
				if state != "empty" {
					drain(t, r)
				}
			}
			said, want := drain(t, r), map[string]string{"1": "socketio: SOCKET_PORT: ", "panic": "TestMain", "failing poll": "TestMain can poll\n"}
			if !strings.Contains(said, want[mode]) {
				t.Errorf("RUN_MAIN=%s, a socket: %v: it said %q", mode, isSocket, said)
			}
		}
	}
}

// Several daemons

// redisServer is a real one, that can be killed and started again.
type redisServer struct {
	t    *testing.T
	addr string
	cmd  *exec.Cmd
}

func startRedis(t *testing.T) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("no redis-server: apt-get install redis-server")
	}
	free, err := net.Listen("tcp", "127.0.0.2:0") // where no connection of another test can take the port while Redis is down
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	r := &redisServer{t: t, addr: free.Addr().String()}
	r.start()
	t.Cleanup(func() { r.kill() })
	return r
}

func (r *redisServer) start() {
	r.t.Helper()
	host, port, _ := net.SplitHostPort(r.addr)
	r.cmd = exec.Command("redis-server", "--port", port, "--bind", host, "--save", "", "--requirepass", "password-of-redis")
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, func() string { // or a daemon that is quicker finds it out of reach
		conn, err := net.Dial("tcp", r.addr)
		if err != nil {
			return err.Error()
		}
		conn.Close()
		return ""
	})
}

func (r *redisServer) kill() { r.cmd.Process.Kill(); r.cmd.Wait() }

func (r *redisServer) url() string { return "REDIS_URL=redis://:password-of-redis@" + r.addr + "/3" }

// words are a command for Redis, with what is no word behind them.
func words(text string, last ...string) []string { return append(strings.Fields(text), last...) }

// do sends commands as anybody can who knows the password: all at one moment, where no daemon can come between.
func (r *redisServer) do(commands ...[]string) {
	r.t.Helper()
	conn, err := net.Dial("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if len(commands) > 1 { // one alone may be one that lets transactions in again
		commands = slices.Concat([][]string{words("MULTI")}, commands, [][]string{words("EXEC")})
	}
	commands = slices.Concat([][]string{words("AUTH password-of-redis"), words("SELECT 3")}, commands, [][]string{words("ECHO done")})
	for _, parts := range commands {
		io.WriteString(conn, array(bulks(parts...)...))
	}
	for br := bufio.NewReader(conn); ; {
		line, err := br.ReadString('\n')
		if err != nil || strings.HasPrefix(line, "-") {
			r.t.Fatalf("%.300q: got %q, %v", commands, line, err)
		}
		if line == "done\r\n" {
			return
		}
	}
}

// bulk returns a bulk string of Redis's protocol, bulks several, and array an array.
func bulk(text string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(text), text) }

func bulks(texts ...string) (items []string) {
	for _, text := range texts {
		items = append(items, bulk(text))
	}
	return items
}

func array(items ...string) string {
	return fmt.Sprintf("*%d\r\n", len(items)) + strings.Join(items, "")
}

// nodes posts to /broadcast and returns delivered and nodes.
func (d *daemon) nodes(body string) (delivered, nodes int) {
	d.t.Helper()
	status, answer, _ := d.request("POST", "/broadcast", body)
	if _, err := fmt.Sscanf(answer, `{"delivered":%d,"message":"Message broadcasted","nodes":%d,"success":true}`, &delivered, &nodes); err != nil || status != 200 {
		d.t.Fatalf("got %d %s", status, answer)
	}
	return delivered, nodes
}

// waitOK waits until /health is.
func (d *daemon) waitOK() {
	d.t.Helper()
	eventually(d.t, func() string {
		if status, answer, _ := d.request("GET", "/health", ""); status != 200 {
			return answer
		}
		return ""
	})
}

// refused posts to /broadcast, and wants it refused with a reason.
func (d *daemon) refused(body string, want int, reason string) {
	d.t.Helper()
	status, answer, header := d.request("POST", "/broadcast", body)
	if status != want || answer != fmt.Sprintf(`{"error":%q,"success":false}`+"\n", reason) || (status == 503) != (header.Get("Retry-After") == "1") {
		d.t.Errorf("%s: got %d %s %v, want %d %s", body, status, answer, header, want, reason)
	}
}

// TestPublish has those together, and away from all others, that want Redis to answer in time where the CPU is short.
func TestPublish(t *testing.T) {
	// The longest first: not all find a place at once.
	t.Run("Refreshes", testRefreshes)
	t.Run("SlowRedis", testSlowRedis)
	t.Run("WrongRedis", testWrongRedis)
	t.Run("Cluster", testCluster)
	t.Run("HostileRedis", testHostileRedis)
	t.Run("RefusingRedis", testRefusingRedis)
	t.Run("LostEntries", testLostEntries)
	t.Run("LowerIDs", testLowerIDs)
	t.Run("HigherIDs", testHigherIDs)
	t.Run("NoRead", testNoRead)
	t.Run("MovedRedis", testMovedRedis)
	t.Run("OneRefresh", testOneRefresh)
	t.Run("NoRunID", testNoRunID)
	t.Run("LostWhispers", testLostWhispers)
}

func testCluster(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := start(t, r.url()), start(t, r.url())
	for _, d := range []*daemon{a, b} {
		d.logs.wait(t, `level=INFO msg="redis reached" addr=`+r.addr+` stream=socketio:3`)
		d.waitHealth("nodes", 2)
	}
	other := start(t, strings.Replace(r.url(), "/3", "/4", 1)) // another application
	other.waitHealth("nodes", 1)
	onA, onB, onOther := a.dial("websocket"), b.dial("polling"), other.dial("websocket")
	for _, c := range []*client{onA, onB, onOther} {
		c.join("5")
	}
	for n := range 200 { // posted to both in turn, they come in this order on both
		body := fmt.Sprintf(`{"channel":"chat-session.5","event":"n","data":%d}`, n)
		if delivered, nodes := []*daemon{a, b}[n%2].nodes(body); delivered != 1 || nodes != 2 {
			t.Errorf("message %d: delivered %d on %d nodes, want 1 on 2", n, delivered, nodes)
		}
	}
	for _, c := range []*client{onA, onB} {
		for n := range 200 {
			c.expect(fmt.Sprintf(`42["n",%d]`, n))
		}
	}
	if delivered, _ := b.nodes(`{"channel":"chat-session.5","event":"not-a","socket":"` + onA.id + `"}`); delivered != 1 {
		t.Errorf("delivered %d on b, want 1", delivered)
	}
	onB.expect(`42["not-a",{}]`)
	a.nodes(`{"channel":"chat-session.5","event":"all","data":"a\nb"}`)
	onA.expect(`42["all","a\nb"]`)
	onB.expect(`42["all","a\nb"]`)
	other.nodes(`{"channel":"chat-session.5","event":"marker"}`)
	onOther.expect(`42["marker",{}]`)

	r.kill()
	for _, d := range []*daemon{a, b} {
		d.logs.wait(t, `level=WARN msg="redis takes no broadcasts: connection refused" addr=`+r.addr)
		d.refused(`{"channel":"chat-session.5","event":"lost"}`, 503, "Redis takes no broadcasts")
		health := regexp.MustCompile(`"nodes":0,"reason":"Redis takes no broadcasts: connection refused",.*"sessions":1,"status":"degraded"`)
		if status, answer, _ := d.request("GET", "/health", ""); status != 503 || !health.MatchString(answer) {
			t.Errorf("/health without Redis: got %d %s", status, answer)
		}
		if status, answer, _ := d.request("GET", "/health", "", "X-Real-IP: 192.0.2.1"); status != 503 || !publicHealth("degraded").MatchString(answer) {
			t.Errorf("/health without Redis, from outside: got %d %s", status, answer)
		}
	}
	for _, c := range []*client{onA, onB} { // still connected, and nothing came
		c.emit("ping")
		c.expect(`42["pong"`)
	}
	r.start()
	for _, c := range []*client{onA, onB} { // Redis was started anew: they may have missed something, and are to reconnect
		c.expectEnd()
	}
	if want := []byte{1001 >> 8, 1001 & 0xff}; !bytes.Equal(onA.closing, want) {
		t.Errorf("close frame: got % x, want % x", onA.closing, want)
	}
	onA, onB = a.dial("polling"), b.dial("websocket")
	onA.join("5")
	onB.join("5")
	a.waitHealth("nodes", 2)
	if delivered, nodes := a.nodes(`{"channel":"chat-session.5","event":"back"}`); delivered != 1 || nodes != 2 {
		t.Errorf("after: delivered %d on %d nodes, want 1 on 2", delivered, nodes)
	}
	onA.expect(`42["back",{}]`)
	onB.expect(`42["back",{}]`)
	for _, d := range []*daemon{a, b} {
		if l := d.logs.String(); strings.Contains(l, "password-of-redis") || strings.Count(l, "connection refused") != 1 || strings.Count(l, "redis reached") != 2 {
			t.Errorf("the log has the password, or not one line for each way:\n%s", l)
		}
	}
	b.stop()
	a.waitHealth("nodes", 1)
}

// TestFrozenRedis stops Redis for longer than anyone waits. What it adds afterwards came too late, and never arrives. Nobody is sent
// back: nothing is missing.
func TestFrozenRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := start(t, r.url()), start(t, r.url())
	a.waitHealth("nodes", 2)
	b.waitHealth("nodes", 2)
	onB := b.dial("websocket")
	onB.join("5")
	a.nodes(`{"channel":"nobody","event":"first"}`) // or it would have no connection to send the next by
	r.cmd.Process.Signal(syscall.SIGSTOP)
	a.refused(`{"channel":"chat-session.5","event":"late"}`, 504, errNoEcho.Error())
	for _, d := range []*daemon{a, b} {
		d.logs.wait(t, `level=WARN msg="redis takes no broadcasts: no answer in 1.75s" addr=`+r.addr)
		d.refused(`{"channel":"chat-session.5","event":"never-sent"}`, 503, "Redis takes no broadcasts")
	}
	r.cmd.Process.Signal(syscall.SIGCONT)
	for _, d := range []*daemon{a, b} {
		d.waitHealth("nodes", 2)
	}
	a.nodes(`{"channel":"chat-session.5","event":"marker"}`)
	onB.expect(`42["marker",{}]`)
}

// TestNoRedisAtStart: the daemon waits for it, and says so.
func TestNoRedisAtStart(t *testing.T) {
	t.Parallel()
	d := start(t, "REDIS_URL=redis://:password-of-redis@127.0.0.1:1")
	d.logs.wait(t, `level=WARN msg="redis takes no broadcasts: connection refused" addr=127.0.0.1:1`)
	c := d.dial("websocket")
	c.join("5")
	d.refused(`{"channel":"chat-session.5","event":"e"}`, 503, "Redis takes no broadcasts")
	if status, answer, _ := d.request("GET", "/health", ""); status != 503 || !strings.Contains(answer, `"nodes":0,"reason":"Redis takes no broadcasts: `) {
		t.Errorf("/health: got %d %s", status, answer)
	}
	f := startFakeRedis(t, func(_ *fakeRedis, _ net.Conn, command []string) (string, bool) {
		return "-LOADING Redis is loading the dataset in memory\r\n", command[0] == "info"
	})
	d = start(t, "REDIS_URL=redis://"+f.addr)
	f.wait(t, "info", 7)                                                                    // for longer than the log's throttle
	d.refused(`{"channel":"chat-session.5","event":"e"}`, 503, "Redis takes no broadcasts") // and not added
	if l := d.logs.String(); strings.Count(l, "takes no broadcasts: LOADING Redis is loading the dataset in memory") != 1 {
		t.Errorf("the same words, not logged once:\n%s", l)
	}
}

// signMessage signs as a daemon does that has the secret; in open mode, where there is none, not at all.
func signMessage(secret, message string) string {
	if secret == "" {
		return "\n" + message
	}
	mac := hmac.New(sha256.New, []byte(secret))
	io.WriteString(mac, "socketio redis 3\n"+message)
	return hex.EncodeToString(mac.Sum(nil)) + "\n" + message
}

// messageFive is one for session 5, with that deadline.
func messageFive(secret string, until int64, event string) string {
	return signMessage(secret, fmt.Sprintf(`{"id":"x","until":%d,"channels":["chat-session.5"],"event":%q}`+"\n{}", until, event))
}

// hostileMessages are what no daemon adds to the stream, and why it is refused.
func hostileMessages(secret string) map[string]string {
	const good = `{"id":"x","until":9000000000000,"channels":["chat-session.5"],"event":"evil"}` + "\n" + `{}`
	signed := func(prefix string) string { // of a join, and of an older daemon
		mac := hmac.New(sha256.New, []byte(secret))
		io.WriteString(mac, prefix+good)
		return hex.EncodeToString(mac.Sum(nil)) + "\n" + good
	}
	messages := map[string]string{
		"": "signature", "\n": "signature", "\n\n": "signature", good: "signature", "\n" + good: "signature", ",\n" + good: "signature",
		signMessage("another-secret-0123", good):                        "signature",
		signed(""):                                                      "signature",
		signed("socketio redis 2\n"):                                    "signature",
		strings.Replace(signMessage(secret, good), "5", "6", 1):         "signature",
		strings.Replace(signMessage(secret, good), `:9000`, `:9001`, 1): "signature",
		strings.ToUpper(signMessage(secret, good)[:64]) + "\n" + good:   "signature",
		strings.Repeat("x", maxPublished+1):                             "it is over",
	}
	five := func(more, data string) string {
		return `{"id":"x","until":9000000000000,"channels":["chat-session.5"]` + more + "}" + data
	}
	for message, reason := range map[string]string{
		"": "header", "\n": "header", "null\n{}": "header", "[]\n{}": "header", "5\n{}": "header", `{"id":1}` + "\n{}": "header",
		`{"channels":["chat-session.5"],"event":"evil"}` + "\n{}":                                                                       "header",
		`{"id":"x","channels":[5],"event":"evil"}` + "\n{}":                                                                             "header",
		`{"id":"x","channels":"chat-session.5","event":"evil"}` + "\n{}":                                                                "header",
		five(`,"event":"evil","until":"9"`, "\n{}"):                                                                                     "header",
		five(`,"event":"evil","until":1e400`, "\n{}"):                                                                                   "header",
		five(`,"event":"evil`+"\xff"+`"`, "\n{}"):                                                                                       "header",
		`{"id":"x","channels":["a"` + strings.Repeat(`,"a"`, 100) + `],"event":"evil"}` + "\n{}":                                        "header",
		`{"id":"x","channels":["a:b"],"event":"evil"}` + "\n{}":                                                                         "channel",
		`{"id":"x","channels":["chat-session.5",""],"event":"evil"}` + "\n{}":                                                           "channel",
		`{"id":"x","channels":["chat-session."],"event":"evil"}` + "\n{}":                                                               "sessionId",
		`{"id":"x","channels":["a"` + strings.Repeat(`,"a"`, 99) + `],"event":"e"}` + "\n\"" + strings.Repeat("x", maxCopies/100) + `"`: "over 8388608 bytes",
		five(`,"event":""`, "\n{}"):                                                                                                     "event",
		five(`,"event":"disconnect"`, "\n{}"):                                                                                           "event",
		five(`,"event":"`+strings.Repeat("é", 201)+`"`, "\n{}"):                                                                         "event",
		five(`,"event":"evil"`, ""):                                                                                                     "data",
		five(`,"event":"evil"`, "\n"):                                                                                                   "data",
		five(`,"event":"evil"`, "\n\x81\x7f"):                                                                                           "data",
		five(`,"event":"evil"`, "\n\x88\x00"):                                                                                           "data",
		five(`,"event":"evil"`, "\n{}]\x1e4"):                                                                                           "data",
		five(`,"event":"evil"`, "\n{}]\n"+`42["evil",{}`):                                                                               "data",
		five(`,"event":"evil"`, "\n\"\xff\""):                                                                                           "data",
		five(`,"event":"evil"`, "\n\""+strings.Repeat("x", maxBody)+`"`):                                                                "data",
	} {
		messages[signMessage(secret, message)] = reason
	}
	return messages
}

// testHostileRedis: whatever anybody adds to the streams, the members get the daemons' messages and nothing else.
func testHostileRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := start(t, r.url(), "SOCKETIO_SECRET="+testSecret), start(t, r.url(), "SOCKETIO_SECRET="+testSecret)
	var clients []*client
	for i, d := range []*daemon{a, b} {
		d.waitHealth("nodes", 2)
		c, admin := d.dial(transportNames[i]), d.dial("websocket")
		c.join("5")
		admin.joinAdmin()
		clients = append(clients, c, admin)
	}
	good, late := messageFive(testSecret, 9e12, "evil"), messageFive(testSecret, 1, "evil")
	began := time.Now()
	for _, stream := range []string{"socketio:3", "socketio:3:whispers"} {
		var hostile [][]string
		add := func(fields ...string) { hostile = append(hostile, words("XADD "+stream+" *", fields...)) }
		for message := range hostileMessages(testSecret) {
			add("m", message)
		}
		add("m", late) // signed once, by a daemon, and added again
		add("M", good)
		add("x", "y", "", good)
		r.do(hostile...)
	}
	const exact = `{"b":12345678901234567890,"a":[1.50,"<` + "\u2028" + `>"], "z":{} }`
	a.broadcast(`{"channel":"chat-session.5","event":"<&>","data":` + exact + `}`)
	for _, c := range clients {
		if got := c.expect(`42[`); !strings.HasSuffix(got, `,`+exact+`]`) || strings.Contains(got, "evil") {
			t.Errorf("got %s", got)
		}
	}
	for _, d := range []*daemon{a, b} {
		if l := d.logs.String(); strings.Contains(l, "level=ERROR") || strings.Contains(l, "evil") || strings.Contains(l, testSecret) ||
			strings.Count(l, "level=WARN") != strings.Count(l, "redis message ignored")+strings.Count(l, "takes no broadcasts") || strings.Count(l, "redis message ignored") > 2+int(time.Since(began).Seconds()) {
			t.Errorf("the log:\n%.3000s", l)
		}
		d.logs.wait(t, `level=WARN msg="redis message ignored: not from a daemon with this SOCKETIO_SECRET and version" stream=socketio:3 error=`)
	}
}

// testRefusingRedis: a Redis that refuses what is added is as good as none. /health and the log have its own words, whenever they change.
func testRefusingRedis(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	d := start(t, r.url())
	d.waitHealth("nodes", 1)
	c := d.dial("websocket")
	c.join("5")
	const post = `{"channel":"chat-session.5","event":"refused"}`
	for _, tt := range []struct{ refuse, accept, words string }{
		{"REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", `READONLY You can't write against a read only replica.`},
		{"ACL SETUSER default -xadd", "ACL SETUSER default +xadd", `NOPERM .*xadd.*`},
		{"CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", `OOM command not allowed when used memory .* 'maxmemory'.`},
	} {
		r.do(words(tt.refuse))
		d.refused(post, 503, "Redis takes no broadcasts") // whether a beat has met it or not
		d.logs.wait(t, `level=WARN msg="redis takes no broadcasts: `+tt.words+`" addr=`+r.addr)
		health := regexp.MustCompile(`"reason":"Redis takes no broadcasts: ` + tt.words + `",.*"sessions":1,"status":"degraded"`)
		if status, answer, _ := d.request("GET", "/health", ""); status != 503 || !health.MatchString(answer) {
			t.Errorf("%s: /health: got %d %s", tt.refuse, status, answer)
		}
		d.refused(post, 503, "Redis takes no broadcasts")
		r.do(words(tt.accept))
		d.waitOK()
		d.nodes(`{"channel":"chat-session.5","event":"marker"}`)
		c.expect(`42["marker",{}]`)
	}
	r.do(words("REPLICAOF 127.0.0.1 1"))
	d.logs.wait(t, `(?s)READONLY.*OOM.*READONLY`)
	r.do(words("REPLICAOF NO ONE"), words("ACL SETUSER default -xadd"))
	d.logs.wait(t, `(?s)NOPERM.*OOM.*READONLY.*NOPERM`)
	if l := d.logs.String(); strings.Count(l, "takes no broadcasts: READONLY") != 2 || strings.Count(l, "redis reached") != 4 {
		t.Errorf("not one line for each change:\n%s", l)
	}
}

// testLostEntries: a node that lost the connection reads on behind the last entry, and its clients stay. Where entries are missing, they
// are sent back; had they been before, it would be a minute later.
func testLostEntries(t *testing.T) {
	for _, trim := range []string{"FLUSHDB", "DEL socketio:3", "XTRIM socketio:3 MAXLEN 0"} {
		t.Run(trim, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			d := start(t, r.url())
			d.waitHealth("nodes", 1)
			c := d.dial("websocket")
			c.join("5")
			kill := words("CLIENT KILL TYPE normal")
			add := func(event string) []string { return words("XADD socketio:3 * m", messageFive("", 9e12, event)) }
			r.do(kill, add("one"), add("two"))
			c.expect(`42["one",{}]`)
			c.expect(`42["two",{}]`)
			next := d.dial("websocket")
			r.do(kill, add("lost"), words(trim))
			next.expectEnd()
			c.expectEnd()
		})
	}
}

// testLowerIDs: where the stream's ids begin anew, the node goes on with them, and its clients are sent back.
func testLowerIDs(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	d := start(t, r.url())
	d.waitHealth("nodes", 1)
	c := d.dial("websocket")
	r.do(words("XADD socketio:3 9000000000000-0 m x"))
	d.logs.wait(t, "redis message ignored")
	r.do(words("DEL socketio:3"))
	c.gone()
	c = d.dial("websocket")
	c.join("5")
	d.waitOK()
	if delivered, nodes := d.nodes(`{"channel":"chat-session.5","event":"e"}`); delivered != 1 || nodes != 1 {
		t.Errorf("delivered %d on %d nodes, want 1 on 1", delivered, nodes)
	}
	c.expect(`42["e",{}]`)
}

// testHigherIDs: where the ids of broadcasts are ahead of Redis's clock, those of whispers are not, and keep no broadcast away.
func testHigherIDs(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	d := start(t, r.url())
	d.waitHealth("nodes", 1)
	speaker, listener := d.dial("websocket"), d.dial("websocket")
	speaker.joinChannel("private-x")
	listener.joinChannel("private-x")
	r.do(words("XADD socketio:3 9000000000000-0 m x")) // as if its clock had gone back since
	d.logs.wait(t, "redis message ignored")
	eventually(t, func() string { // until a beat has told
		status, answer, _ := d.request("POST", "/broadcast", `{"channel":"nobody","event":"e"}`)
		if status != 200 {
			return answer
		}
		return ""
	})
	for range 5 {
		speaker.emit("whisper", `{"channel":"private-x","event":"e"}`)
		listener.expect(`42["broadcast",{"channel":"private-x","event":"client-e"`)
		d.nodes(`{"channel":"private-x","event":"e"}`)
		listener.expect(`42["broadcast",{"channel":"private-x","event":"e"`)
	}
}

// testNoRead: a Redis that takes entries and gives none takes no broadcasts.
func testNoRead(t *testing.T) {
	for _, name := range []string{"xread", "xrange"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRedis(t)
			d := start(t, r.url())
			d.waitHealth("nodes", 1)
			r.do(words("ACL SETUSER default -" + name))
			d.logs.wait(t, `takes no broadcasts: NOPERM .*`+name)
			for range 200 { // for longer than redisRetry
				d.refused(`{"channel":"chat-session.5","event":"e"}`, 503, "Redis takes no broadcasts")
				if t.Failed() {
					t.Fatalf("the log:\n%s", d.logs)
				}
				time.Sleep(5 * time.Millisecond)
			}
			r.do(words("ACL SETUSER default +" + name))
			d.waitOK()
			if l := d.logs.String(); strings.Count(l, "NOPERM") != 1 || strings.Count(l, "redis reached") != 2 {
				t.Errorf("not one line for each way:\n%s", l)
			}
		})
	}
}

// testMovedRedis: new connections lead to another Redis, and open ones stay where they are. No post is answered 200 that this node never reads.
func testMovedRedis(t *testing.T) {
	t.Parallel()
	from, to := startRedis(t), startRedis(t)
	var addr atomic.Value
	addr.Store(from.addr)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("tcp", addr.Load().(string))
			if err != nil {
				conn.Close()
				continue
			}
			go func() { io.Copy(back, conn); back.Close() }()
			go func() { io.Copy(conn, back); conn.Close() }()
		}
	}()
	d := start(t, "REDIS_URL=redis://:password-of-redis@"+listener.Addr().String()+"/3")
	d.waitHealth("nodes", 1)
	addr.Store(to.addr)
	conn, err := net.Dial("tcp", from.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, array(bulks("AUTH", "password-of-redis")...)+array(bulks("CLIENT", "LIST")...))
	for br := bufio.NewReader(conn); ; { // cut the connection that reads, and that one alone
		line, err := br.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, "cmd=xread") {
			from.do(words("CLIENT KILL ID " + strings.TrimPrefix(strings.Fields(line)[0], "id=")))
			break
		}
	}
	d.logs.wait(t, `(?s)redis reached.*redis reached`)
	c := d.dial("websocket") // behind the refresh: it is another Redis
	c.join("5")
	for good := 0; good < 50; {
		status, answer, _ := d.request("POST", "/broadcast", `{"channel":"chat-session.5","event":"e"}`)
		if status == 200 {
			good++
		}
		if status == 200 && !strings.Contains(answer, `"delivered":1`) {
			t.Fatalf("got %d %s. The log:\n%s", status, answer, d.logs)
		}
	}
}

// testOneRefresh: what is missing is noticed once, however much comes behind it.
func testOneRefresh(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	options, err := redis.ParseURL(strings.TrimPrefix(r.url(), "REDIS_URL="))
	if err != nil {
		t.Fatal(err)
	}
	s := newTestServer(t)
	s.cluster = newCluster(s, options)
	d := serveOn(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan bool)
	go func() { s.cluster.run(ctx); close(ended) }()
	d.waitHealth("nodes", 1)
	c := d.dial("websocket")
	commands := [][]string{words("FLUSHDB")}
	for range 3 * streamBatch {
		commands = append(commands, words("XADD socketio:3 * m", strings.Repeat("x", 10_000)))
	}
	r.do(commands...)
	c.gone()
	client := redis.NewClient(options)
	defer client.Close()
	length := client.XLen(ctx, "socketio:3").Val()
	eventually(t, func() string {
		if n := client.XLen(ctx, "socketio:3").Val(); n < length+4 {
			return fmt.Sprintf("%d entries and then %d: no beat looks for what is missing", length, n)
		}
		return ""
	})
	cancel()
	<-ended
	if s.cluster.refreshAt.After(time.Now()) {
		t.Errorf("another refresh is due in %v", time.Until(s.cluster.refreshAt))
	}
}

// newTestCluster returns a cluster without Redis.
func newTestCluster(t testing.TB, env ...string) (c *cluster, log *logs) {
	t.Helper()
	s, log := newLoggedServer(t, slog.LevelError, env...)
	return newCluster(s, &redis.Options{}), log
}

// TestFormerRedis: what a Redis says that is no longer read is no trouble of the one that is.
func TestFormerRedis(t *testing.T) {
	c, _ := newTestCluster(t)
	former, current := new(link), new(link)
	c.link.Store(current)
	c.fail(former, errors.New("LOADING"))
	if c.link.Load() != current || *c.trouble.Load() == "LOADING" {
		t.Errorf("another Redis is blamed: %s", *c.trouble.Load())
	}
	c.fail(current, errors.New("LOADING"))
	if problem := c.problem(); problem != "Redis takes no broadcasts: LOADING" {
		t.Errorf("got %s", problem)
	}
}

// TestRedisMessages: what is refused, and why; what is delivered, and when; and in open mode what is signed, too.
func TestRedisMessages(t *testing.T) {
	c, log := newTestCluster(t, "SOCKETIO_SECRET=the-new-secret-0123456789abcdef01234,"+testSecret)
	for message, want := range hostileMessages(testSecret) {
		if _, err := c.unseal(message); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.200q: got %v, want %s", message, err, want)
		}
		c.deliver(1, message)
	}
	if n := c.server.hub.sequence; n != 0 || strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("%d were broadcast. The log:\n%.3000s", n, log)
	}
	open, _ := newTestCluster(t)
	const good = `{"id":"x","until":5000,"channels":["chat-session.5","private-x"],"except":"y","event":"é"}` + "\n" + ` {"a": 1}`
	for _, tt := range []struct {
		c       *cluster
		message string
		good    bool
	}{
		{c, signMessage(testSecret, good), true},
		{c, signMessage("the-new-secret-0123456789abcdef01234", good), true},
		{c, "x," + signMessage(testSecret, good), true},
		{c, "\n" + good, false},
		{open, "\n" + good, true},
		{open, good, false},
		{open, signMessage(testSecret, good), false},
	} {
		m, err := tt.c.unseal(tt.message)
		if (err == nil) != tt.good {
			t.Errorf("%q: got %v", tt.message, err)
		}
		if tt.good && (m.ID != "x" || m.Until != 5000 || m.Except != "y" || m.Event != "é" || string(m.data) != ` {"a": 1}` || len(m.Channels) != 2) {
			t.Errorf("%q: got %+v", tt.message, m)
		}
	}

	result := make(chan int, 1)
	for added, want := range map[int64]int{4999: 0, 5000: 0, 5001: -1} { // which -1 has its post refused
		open.published.Store("x", result)
		open.deliver(added, "\n"+good)
		if got := <-result; got != want {
			t.Errorf("added at %d: got %d, want %d", added, got, want)
		}
	}
	if n := open.server.hub.sequence; n != 2 {
		t.Errorf("%d were broadcast, want the 2 that were not late", n)
	}
	for _, tt := range []struct {
		added int64
		node  string
		nodes int64
	}{{1000, "a", 1}, {1200, "b", 2}, {1300, "a", 2}, {2900, "a", 2}, {3000, "a", 1}} { // b's last is 1.75 s behind
		open.deliver(tt.added, "\n"+`{"id":"`+tt.node+`","until":1,"channels":null}`+"\n")
		if n := open.nodes.Load(); n != tt.nodes {
			t.Errorf("at %d: %d nodes, want %d", tt.added, n, tt.nodes)
		}
	}
	for _, tt := range []struct {
		m      message
		length int64
	}{
		{message{data: []byte("{}")}, 10_000},
		{message{data: make([]byte, maxBody)}, 63}, // 64 MiB of them
		{message{Whisper: true}, 256},
	} {
		if e := open.seal(tt.m); e.length != tt.length || strings.HasSuffix(e.stream, ":whispers") != tt.m.Whisper {
			t.Errorf("of %d bytes: %s is trimmed to %d, want %d", len(tt.m.data), e.stream, e.length, tt.length)
		}
	}
}

// TestClusterSecretChange: daemons are restarted one by one with new,old and then with new, and none loses the others' messages.
func TestClusterSecretChange(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	const old, next = "the-old-secret-0123456789abcdef01234", "the-new-secret-0123456789abcdef01234"
	for _, tt := range []struct {
		a, b  string
		nodes int
	}{{old, next + "," + old, 2}, {next + "," + old, next + "," + old, 2}, {next + "," + old, next, 2}, {old, next, 1}} {
		nodes := []*daemon{start(t, r.url(), "SOCKETIO_SECRET="+tt.a), start(t, r.url(), "SOCKETIO_SECRET="+tt.b)}
		secrets := []string{tt.a[:len(old)], tt.b[:len(old)]}
		var members []*client
		for i, d := range nodes {
			d.waitHealth("nodes", tt.nodes)
			c := d.dial("websocket")
			c.call("join-admin", fmt.Sprintf(`{"auth":%q}`, sign(secrets[i], c.id, "admin-chat")))
			members = append(members, c)
		}
		for n := range 4 {
			from := n % 2
			status, answer, _ := nodes[from].request("POST", "/broadcast", fmt.Sprintf(`{"channel":"admin-chat","event":"n","data":%d}`, n), "Authorization: Bearer "+secrets[from])
			if status != 200 || !strings.Contains(answer, `"delivered":1,`) {
				t.Errorf("%s and %s: got %d %s", tt.a, tt.b, status, answer)
			}
			for to, c := range members {
				if to == from || tt.nodes == 2 {
					c.expect(fmt.Sprintf(`42["n",%d]`, n))
				}
			}
		}
		for _, d := range nodes {
			if tt.nodes == 1 {
				d.logs.wait(t, "redis message ignored")
			} else if strings.Contains(d.logs.String(), "redis message ignored") {
				t.Errorf("%s and %s: the log:\n%s", tt.a, tt.b, d.logs)
			}
			d.stop()
		}
	}
}

// fakeRedis is one that can be slow and wrong: answer may return what a command is answered with, instead of what Redis says.
type fakeRedis struct {
	addr   string
	answer func(f *fakeRedis, conn net.Conn, command []string) (reply string, ok bool)

	mu       sync.Mutex
	conns    []net.Conn
	runID    string
	streams  map[string][]fakeEntry
	number   int           // of the last entry
	latest   int64         // the time in its id
	more     chan struct{} // closed when there is another
	commands chan string   // each that came, without what is added
}

type fakeEntry struct {
	number int
	reply  string
}

func startFakeRedis(t *testing.T, answer func(f *fakeRedis, conn net.Conn, command []string) (string, bool)) *fakeRedis {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	f := &fakeRedis{addr: listener.Addr().String(), answer: answer, commands: make(chan string, 10000), runID: "a",
		streams: make(map[string][]fakeEntry), more: make(chan struct{})}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns = append(f.conns, conn)
			f.mu.Unlock()
			go f.serve(conn)
		}
	}()
	return f
}

func (f *fakeRedis) serve(conn net.Conn) {
	defer conn.Close()
	br := bufio.NewReader(conn)
	for {
		var n, size int
		if _, err := fmt.Fscanf(br, "*%d\r\n", &n); err != nil {
			return
		}
		command := make([]string, n)
		for i := range command {
			if _, err := fmt.Fscanf(br, "$%d\r\n", &size); err != nil {
				return
			}
			b := make([]byte, size+2)
			if _, err := io.ReadFull(br, b); err != nil {
				return
			}
			command[i] = string(b[:size])
		}
		f.commands <- strings.Join(command[:max(1, n-1)], " ")
		reply, ok := f.answer(f, conn, command)
		if !ok {
			reply = f.reply(command)
		}
		io.WriteString(conn, reply)
	}
}

// reply is what Redis says.
func (f *fakeRedis) reply(command []string) string {
	n := len(command)
	switch command[0] {
	case "info":
		f.mu.Lock()
		defer f.mu.Unlock()
		return bulk("# Server\r\nrun_id:" + f.runID + "\r\n")
	case "xadd":
		return f.add(command, 0)
	case "xrange":
		entries, _ := f.behind(command[1], command[2])
		return entries
	case "xread":
		block, _ := time.ParseDuration(command[4] + "ms")
		for timeout := time.After(block); ; {
			first, _ := f.behind(command[n-4], command[n-2]+"+")
			second, more := f.behind(command[n-3], command[n-1]+"+")
			if first+second != array()+array() {
				return array(array(bulk(command[n-4]), first), array(bulk(command[n-3]), second))
			}
			select {
			case <-more:
			case <-timeout:
				return "*-1\r\n"
			}
		}
	}
	return "-ERR unknown command\r\n"
}

// add adds an entry, so much later than it is.
func (f *fakeRedis) add(command []string, later time.Duration) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.number++
	f.latest = max(f.latest, time.Now().Add(later).UnixMilli()) // ids never go back
	id := bulk(fmt.Sprintf("%d-%d", f.latest, f.number))
	f.streams[command[1]] = append(f.streams[command[1]], fakeEntry{f.number, array(id, array(bulks("m", command[len(command)-1])...))})
	close(f.more)
	f.more = make(chan struct{})
	return id
}

// behind returns a stream's entry of that id; with a + those that came after it.
func (f *fakeRedis) behind(stream, id string) (entries string, more chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, number, _ := strings.Cut(id, "-")
	id, after := strings.CutSuffix(number, "+")
	n, _ := strconv.Atoi(id)
	var found []string
	for _, entry := range f.streams[stream] {
		if entry.number == n && !after || entry.number > n && after {
			found = append(found, entry.reply)
		}
	}
	return array(found...), f.more
}

// drop closes all connections; with another runID it was started anew.
func (f *fakeRedis) drop(runID string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runID = runID
	for _, conn := range f.conns {
		conn.Close()
	}
	f.conns = nil
}

// wait waits for the n-th of a command from here on.
func (f *fakeRedis) wait(t *testing.T, name string, n int) {
	t.Helper()
	for len(f.commands) > 0 {
		<-f.commands
	}
	for deadline := time.After(patience); n > 0; {
		select {
		case command := <-f.commands:
			if strings.HasPrefix(command, name) {
				n--
			}
		case <-deadline:
			t.Fatalf("no %s came", name)
		}
	}
}

// addedEvent returns the event that a command adds; of a beat and of any other command, none.
func addedEvent(command []string) string {
	_, m, _ := strings.Cut(command[len(command)-1], "\n")
	m, _, _ = strings.Cut(m, "\n")
	var header message
	json.Unmarshal([]byte(m), &header)
	return header.Event
}

// testSlowRedis: a Redis that never answers, or greets late, takes no longer than publishTimeout. What was answered 503 because
// the greeting was late is not sent later. And a daemon that stops has its posts answered first.
func testSlowRedis(t *testing.T) {
	t.Parallel()
	var slow atomic.Bool
	var sent atomic.Int64
	released, hangs := make(chan struct{}), make(chan struct{}, 10)
	f := startFakeRedis(t, func(_ *fakeRedis, _ net.Conn, command []string) (string, bool) {
		if command[0] == "hello" && slow.Load() {
			<-released
		}
		if addedEvent(command) == "" {
			return "", false
		}
		sent.Add(1)
		hangs <- struct{}{}
		return "", true // and never an answer
	})
	d := start(t, "REDIS_URL=redis://"+f.addr)
	d.waitHealth("nodes", 1)
	post := func() int {
		began := time.Now()
		status, answer, _ := d.request("POST", "/broadcast", `{"channel":"admin-chat","event":"e"}`)
		if took := time.Since(began); took > 2*publishTimeout { // half of it is a loaded machine's
			t.Errorf("it took %v to answer %d %s, want %v", took, status, answer, publishTimeout)
		}
		return status
	}
	if status := post(); status != 504 || sent.Load() != 1 {
		t.Errorf("never answered: got %d, and %d were sent; want 504 and 1", status, sent.Load())
	}
	slow.Store(true)
	var unknown, refused atomic.Int64
	each(5, func(int) { // the pool has one or two connections for them
		switch status := post(); status {
		case 503:
			refused.Add(1)
		case 504:
			unknown.Add(1)
		}
	})
	if unknown.Load() != sent.Load()-1 || refused.Load() == 0 || refused.Load()+unknown.Load() != 5 {
		t.Errorf("greeted late: %d got 503 and %d 504, and %d were sent", refused.Load(), unknown.Load(), sent.Load()-1)
	}
	close(released)
	d.waitOK()
	f.wait(t, "xadd socketio:0 maxlen ~ 10000 * m", 2)
	if n := sent.Load(); n != 1+unknown.Load() {
		t.Errorf("%d were sent later", n-1-unknown.Load())
	}

	for len(hangs) > 0 {
		<-hangs
	}
	late := d.slowPost(`{"channel":"admin-chat","event":"e"}`)
	statuses, ended := make(chan int, 3), make(chan error)
	for range 3 {
		go func() { statuses <- post() }()
		<-hangs
	}
	go func() { ended <- d.stop() }()
	d.logs.wait(t, "msg=stopping")
	if status := late(); status != 503 {
		t.Errorf("stopping: got %d, want 503", status)
	}
	<-ended
	for range 3 {
		if status := <-statuses; status != 504 {
			t.Errorf("stopped amid a post: got %d, want 504", status)
		}
	}
}

// testWrongRedis: each way in which Redis fails a broadcast has its status, and only what was answered 200 is delivered.
func testWrongRedis(t *testing.T) {
	t.Parallel()
	answer := func(f *fakeRedis, conn net.Conn, command []string) (string, bool) {
		switch name := addedEvent(command); name {
		case "-LOADING", "-READONLY", "-MISCONF", "-NOAUTH", "-MASTERDOWN", "-MOVED 1 127.0.0.1:1", "-ERR":
			return name + " and more words\r\n", true
		case "late":
			return f.add(command, time.Hour), true
		case "late-cut":
			f.add(command, 2*time.Hour)
			conn.Close()
		case "lost":
			conn.Close()
		case "silent", "silent-2", "silent-3", "silent-4":
			f.add(command, 0)
		case "late-silent":
			f.add(command, 3*time.Hour)
		case "cut": // the answer alone is lost
			f.add(command, 0)
			conn.Close()
		default:
			return "", false
		}
		return "", true
	}
	want := map[string]int{"cut": 200, "silent": 200, "silent-2": 200, "silent-3": 200, "silent-4": 200, "fine": 200, "lost": 504} // else 503
	for _, events := range [][]string{{"-LOADING"}, {"-READONLY"}, {"-MISCONF"}, {"-NOAUTH"}, {"-MASTERDOWN"}, {"-MOVED 1 127.0.0.1:1"}, {"-ERR"},
		{"late"}, {"late-cut", "lost", "cut"}, {"late-silent", "silent"}, {"silent", "silent-2", "silent-3", "silent-4"}} {
		t.Run(events[0], func(t *testing.T) {
			t.Parallel()
			d := start(t, "REDIS_URL=redis://"+startFakeRedis(t, answer).addr)
			d.waitHealth("nodes", 1)
			c := d.dial("websocket")
			c.join("5")
			for _, event := range append(events, "fine") {
				d.waitOK() // after what was refused
				body := fmt.Sprintf(`{"channel":"chat-session.5","event":%q}`, event)
				switch want[event] {
				case 200:
					if delivered, nodes := d.nodes(body); delivered != 1 || nodes != 1 {
						t.Errorf("%s: delivered %d on %d nodes, want 1 on 1", event, delivered, nodes)
					}
					c.expect(`42["` + event + `",{}]`)
				case 504:
					d.refused(body, 504, errNoEcho.Error())
				default:
					d.refused(body, 503, "Redis takes no broadcasts")
				}
			}
			if name, ok := strings.CutPrefix(events[0], "-"); ok {
				name, _, _ = strings.Cut(name, " ")
				d.logs.wait(t, `level=WARN msg="redis takes no broadcasts: `+name)
			}
		})
	}
}

// TestOddRedis: an answer of any type to any command costs the connection at most. Nothing comes of it.
func TestOddRedis(t *testing.T) {
	t.Parallel()
	entry := func(id, fields string) string { return array(array(bulk("socketio:0"), array(array(id, fields)))) }
	for i, reply := range []string{
		"+OK\r\n", "-ERR no\r\n", ":5\r\n", ":x\r\n", "$-1\r\n", "*-1\r\n", "$-2\r\n", "*-2\r\n", "\r\n", "x\r\n", "%1\r\n", bulk(""), bulk("x"),
		array(), array(":1\r\n"), array(bulk("x")), array(bulk("1-1"), "*-1\r\n"), array(array(":1\r\n", ":2\r\n")), array(array(bulk("1-1"), array(bulk("m")))),
		array(array(bulk("socketio:0"), "*-1\r\n")), array(array(bulk("socketio:0"), bulk("x"))), array(array(bulk("x"), array())),
		"*9223372036854775806\r\n", "$9223372036854775807\r\n", array(array(bulk("socketio:0"), "*9223372036854775806\r\n")),
		entry(bulk("1-1"), array(bulks("m", "evil")...)), entry(bulk("1-1"), "*-1\r\n"), entry(bulk("1-1"), array(bulk("m"), ":1\r\n")), entry(bulk("1-1"), array(bulk("m"))), entry("$-1\r\n", array()),
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			t.Parallel()
			var odd atomic.Value // the command that is answered so, once
			odd.Store("")
			f := startFakeRedis(t, func(f *fakeRedis, conn net.Conn, command []string) (string, bool) {
				return reply, odd.CompareAndSwap(strings.TrimSpace(command[0]+" "+addedEvent(command)), "")
			})
			d := start(t, "REDIS_URL=redis://"+f.addr)
			d.waitHealth("nodes", 1)
			for n, name := range []string{"xadd", "xadd evil", "xadd client-evil", "xrange", "xread", "info"} {
				c := d.dial("websocket")
				c.join(strconv.Itoa(n))
				c.joinChannel("private-x")
				odd.Store(name)
				if name == "info" {
					f.drop("a")
				}
				var whispered time.Time
				eventually(t, func() string {
					switch {
					case odd.Load() == "":
						return ""
					case name == "xadd evil":
						d.request("POST", "/broadcast", `{"channel":"nobody","event":"evil"}`)
					case name == "xadd client-evil" && time.Since(whispered) > patience/50: // who whispers more often is cut off
						c.emit("whisper", `{"channel":"private-x","event":"evil"}`)
						whispered = time.Now()
					}
					return name + " never came"
				})
				sentBack := name == "info" || name == "xrange" // it may say that entries are lost, or that it is another Redis
				eventually(t, func() string {
					status, answer, _ := d.request("POST", "/broadcast", fmt.Sprintf(`{"channel":"chat-session.%d","event":"marker"}`, n))
					if status != 200 || !sentBack && !strings.Contains(answer, `"delivered":1,`) {
						return fmt.Sprintf("%s answered %q: got %d %s", name, reply, status, answer)
					}
					return ""
				})
				if !sentBack {
					c.expect(`42["marker",{}]`)
				}
			}
		})
	}
}

// testNoRunID: what takes Redis' place may not say which one it is. It takes broadcasts, and a lost connection is no other Redis.
func testNoRunID(t *testing.T) {
	t.Parallel()
	f := startFakeRedis(t, func(_ *fakeRedis, _ net.Conn, command []string) (string, bool) {
		return bulk("# Server\r\nredis_version:7.0.0\r\n"), command[0] == "info"
	})
	d := start(t, "REDIS_URL=redis://"+f.addr)
	d.waitHealth("nodes", 1)
	c := d.dial("websocket")
	c.join("5")
	for n := range 3 {
		if delivered, nodes := d.nodes(fmt.Sprintf(`{"channel":"chat-session.5","event":"n","data":%d}`, n)); delivered != 1 || nodes != 1 {
			t.Errorf("delivered %d on %d nodes, want 1 on 1", delivered, nodes)
		}
		c.expect(fmt.Sprintf(`42["n",%d]`, n))
		f.drop("")
		d.logs.wait(t, `(?s)`+strings.Repeat(`redis reached.*`, n+2))
		d.waitHealth("nodes", 1)
	}
	c.expectNothing("5")
}

// testLostWhispers: what becomes of a whisper on its way to Redis is not what becomes of posts.
func testLostWhispers(t *testing.T) {
	t.Parallel()
	faults := make(chan string, 10)
	f := startFakeRedis(t, func(_ *fakeRedis, conn net.Conn, command []string) (string, bool) {
		fault, isFault := strings.CutPrefix(addedEvent(command), "client-fault ")
		if !isFault {
			return "", false
		}
		defer func() { faults <- fault }()
		switch fault {
		case "cut":
			conn.Close()
		case "refused":
			return "-OOM command not allowed\r\n", true
		case "no id":
			return "+OK\r\n", true
		}
		return "", true // and never an answer
	})
	d := start(t, "REDIS_URL=redis://"+f.addr)
	d.waitHealth("nodes", 1)
	speaker, listener := d.dial("websocket"), d.dial("websocket")
	speaker.joinChannel("private-x")
	listener.joinChannel("private-x")
	for _, fault := range []string{"cut", "refused", "no id", "silent"} {
		for came, tries := false, 0; !came; tries++ { // a loaded machine may not have it there within whisperTimeout
			if tries == 20 {
				t.Fatalf("%s: the whisper never came to Redis", fault)
			}
			speaker.emit("whisper", `{"channel":"private-x","event":"fault `+fault+`"}`)
			select {
			case got := <-faults:
				came = got == fault
			case <-time.After(patience / 20):
			}
		}
		if delivered, nodes := d.nodes(`{"channel":"private-x","event":"` + fault + `"}`); delivered != 2 || nodes != 1 {
			t.Errorf("%s: delivered %d on %d nodes, want 2 on 1", fault, delivered, nodes)
		}
		for _, c := range []*client{speaker, listener} {
			c.expect(`42["broadcast",{"channel":"private-x","event":"` + fault + `","data":{}}]`)
		}
	}
	f.wait(t, "xadd", 3) // the whispers' time-out has passed
	if l := d.logs.String(); strings.Count(l, "redis reached") != 1 || strings.Contains(l, "takes no broadcasts") {
		t.Errorf("the log:\n%s", l)
	}
}

// testRefreshes: a node whose Redis is started anew again and again has its clients reconnect once, and once more a minute later. One
// that only loses the connection has none reconnect.
func testRefreshes(t *testing.T) {
	t.Parallel()
	f := startFakeRedis(t, func(*fakeRedis, net.Conn, []string) (string, bool) { return "", false })
	d := start(t, "REDIS_URL=redis://"+f.addr)
	d.waitHealth("nodes", 1)
	var clients []*client
	for range 100 { // one of them would be sent back within 50 ms
		c := d.dial("websocket")
		c.join("5")
		clients = append(clients, c)
	}
	lose := func(runIDs ...string) {
		for _, runID := range runIDs {
			reached := strings.Count(d.logs.String(), "redis reached")
			d.waitHealth("nodes", 1)
			f.drop(runID)
			d.logs.wait(t, `(?s)`+strings.Repeat(`redis reached.*`, reached+1))
		}
		f.wait(t, "xadd", 4)
		d.waitHealth("nodes", 1) // the log is a moment ahead
	}
	lose("a", "a", "a")
	clients[0].expectNothing("5")
	for _, c := range clients[1:] {
		c.expect(`42["marker",{}]`)
	}
	lose("b")
	for i, c := range clients {
		c.gone()
		clients[i] = d.dial("websocket")
		clients[i].join("5")
	}
	lose("c", "b", "d")
	clients[0].expectNothing("5")
	for _, c := range clients[1:] {
		c.expect(`42["marker",{}]`)
	}

	synctest.Test(t, func(t *testing.T) {
		s := &server{hub: newHub(), log: slog.New(slog.DiscardHandler)}
		cluster := &cluster{server: s}
		cluster.refresh()  // nobody is there
		var ended [220]int // by second
		for second := range ended {
			if slices.Contains([]int{1, 10, 11, 30, 100, 200}, second) {
				for i := range 100 {
					c := &session{server: s, id: fmt.Sprint(second, i), heart: time.NewTimer(0), unconnected: time.NewTimer(0)}
					c.changed.L = &c.mu
					s.sessions.Store(c.id, c)
				}
				s.connections.Add(100)
				cluster.refresh()
			}
			before := s.connections.Load()
			time.Sleep(time.Second)
			ended[second] = int(before - s.connections.Load())
		}
		// The clients of 10, 11 and 30 wait until 61, that of 100 until 121. Each place is given back closeTimeout later.
		for _, want := range []struct{ second, n int }{{1, 100}, {61, 300}, {121, 100}, {200, 100}} {
			first := want.second + int(closeTimeout.Seconds())
			sum := 0
			for second := first; second < first+5; second++ {
				sum += ended[second]
				if ended[second] < want.n/20 {
					t.Errorf("second %d: %d of %d were sent back, want them spread over 5", second, ended[second], want.n)
				}
			}
			if sum != want.n {
				t.Errorf("from second %d on %d were sent back, want %d", want.second, sum, want.n)
			}
		}
	})
}

// TestChannelsAcrossNodes: over Redis channels, toOthers and whispers reach the members on all nodes, in order.
func TestChannelsAcrossNodes(t *testing.T) {
	t.Parallel()
	r := startRedis(t)
	a, b := start(t, r.url(), "SOCKETIO_SECRET="+testSecret, unhurried), start(t, r.url(), "SOCKETIO_SECRET="+testSecret, unhurried)
	a.waitHealth("nodes", 2)
	b.waitHealth("nodes", 2)
	onA, onB, other := a.dial("websocket"), b.dial("polling"), b.dial("websocket")
	for _, c := range []*client{onA, onB} {
		c.joinChannel("private-x")
	}
	other.joinChannel("x")
	a.broadcast(`{"channel":"private-x","event":"e","data":{"a": 1}}`)
	a.broadcast(`{"channels":["private-x","x"],"event":"e","data":2,"socket":"` + onB.id + `"}`)
	onA.expect(`42["broadcast",{"channel":"private-x","event":"e","data":{"a": 1}}]`)
	onB.expect(`42["broadcast",{"channel":"private-x","event":"e","data":{"a": 1}}]`)
	onA.expect(`42["broadcast",{"channel":"private-x","event":"e","data":2}]`)
	other.expect(`42["broadcast",{"channel":"x","event":"e","data":2}]`)
	// Whispers are owed to nobody: on a loaded machine Redis may not take one within whisperTimeout.
	again := func(c *client, event string) (stop func()) {
		done := make(chan struct{})
		var whispering sync.WaitGroup
		whispering.Go(func() {
			for {
				c.emit("whisper", `{"channel":"private-x","event":"`+event+`"}`)
				select {
				case <-done:
					return
				case <-time.After(time.Second):
				}
			}
		})
		stop = sync.OnceFunc(func() { close(done); whispering.Wait() })
		t.Cleanup(stop)
		return stop
	}
	for n := range 50 {
		onA.emit("whisper", fmt.Sprintf(`{"channel":"private-x","event":"n","data":%d}`, n))
	}
	stop := again(onA, "last")
	came, last := 0, -1
	for {
		packet := onB.expect(`42["broadcast",{"channel":"private-x","event":"client-`)
		if strings.HasPrefix(packet, "last") {
			break
		}
		var n int
		if _, err := fmt.Sscanf(packet, `n","data":%d}]`, &n); err != nil || n <= last {
			t.Fatalf("got %s behind %d, %v", packet, last, err)
		}
		came, last = came+1, n
	}
	if came == 0 {
		t.Error("none of 50 whispers came")
	}
	stop()
	stop = again(onB, "back")
	onA.expect(`42["broadcast",{"channel":"private-x","event":"client-back","data":{}}]`) // and none of its own
	stop()
	r.kill()
	a.logs.wait(t, `redis takes no broadcasts`)
	onA.send(`427["whisper",{"channel":"private-x","event":"lost"}]`) // and not waited for
	if err := onA.skip(`437[{}]`); err != nil {
		t.Error(err)
	}
}

// Performance: what a connection and a delivery cost

// alone reports whether this is a process that runs the test alone: else it runs one. Here the heap has what other tests leave, and
// loses it at any time.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv("ALONE") != "" {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "ALONE=1")
	said, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(said, []byte("--- PASS: "+t.Name())) {
		t.Errorf("%v:\n%s", err, said)
	}
	return false
}

// TestIdleMemory: a connection keeps nothing of its handshake, such as net/http's 8 KiB of buffers, and nothing of the library's.
func TestIdleMemory(t *testing.T) {
	if !alone(t) {
		return
	}
	const connections = 500
	d := start(t)
	before := liveHeap()
	clients := make([]net.Conn, connections)
	for i := range clients {
		c := d.handshake("websocket", "Cookie: "+strings.Repeat("x", 4000))
		c.connect()
		c.join(fmt.Sprint(i % 50))
		clients[i] = c.conn // and not its buffer
	}
	each := (liveHeap() - before) / connections
	t.Logf("%d bytes of heap for each connection and its client", each)
	if each < 1<<10 || each > 8<<10 {
		t.Errorf("%d bytes for each connection, want at most 8 KiB", each)
	}
	runtime.KeepAlive(clients)
}

// TestParkedPollMemory: a poll that waits keeps nothing of its request.
func TestParkedPollMemory(t *testing.T) {
	if !alone(t) {
		return
	}
	d := start(t)
	const polls = 100
	before := liveHeap()
	for range polls {
		c := d.dial("polling")
		c.join("5")
		var fields strings.Builder
		for i := range 99 {
			fmt.Fprintf(&fields, "x-%d: %s\n", i, strings.Repeat("x", 120))
		}
		d.raw(fmt.Sprintf("GET %s&sid=%s HTTP/1.1\nHost: 127.0.0.1\n%s\n", handshakePath, c.sid, fields.String()))
	}
	d.waitHealth("connections", polls)
	d.broadcast(`{"channel":"chat-session.6","event":"none"}`)
	if each := (liveHeap() - before) / polls; each < 1<<10 || each > 48<<10 {
		t.Errorf("%d bytes for each poll and its client, want at most 48 KiB", each)
	}
}

// BenchmarkFanOut broadcasts to 1,000 connections over loopback, in a session's room and in a channel by its name, until the
// last frame has left, and gives the cost of one delivery.
func BenchmarkFanOut(b *testing.B) {
	const members = 1000
	for channel, join := range map[string]func(c *client){
		"chat-session.5": func(c *client) { c.join("5") },
		"private-x":      func(c *client) { c.joinChannel("private-x") },
	} {
		b.Run(channel, func(b *testing.B) {
			s, d := serve(b)
			for range members {
				c := d.dial("websocket")
				join(c)
				c.conn.SetDeadline(time.Time{})
				go io.Copy(io.Discard, c.conn)
			}
			body := `{"channel":"` + channel + `","event":"message.sent","data":{"message":"` + strings.Repeat("x", 200) + `"}}`
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			b.ResetTimer()
			for range b.N {
				if got := d.broadcast(body); got != members {
					b.Fatalf("delivered %d, want %d", got, members)
				}
			}
			eventually(b, func() string {
				if n := s.backlog.total.Load(); n > 0 {
					return fmt.Sprintf("%d bytes wait", n)
				}
				return ""
			})
			b.StopTimer()
			runtime.ReadMemStats(&after)
			deliveries := float64(b.N * members)
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/deliveries, "ns/delivery")
			b.ReportMetric(float64(after.Mallocs-before.Mallocs)/deliveries, "allocs/delivery")
			b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/deliveries, "B/delivery")
		})
	}
}

// BenchmarkMessage gives what a message of 15 KB costs, with whatever is in it.
func BenchmarkMessage(b *testing.B) {
	fill := func(before, part, after string) []byte {
		return []byte(before + strings.Repeat(part, (15_000-len(before)-len(after))/len(part)) + after)
	}
	nested := func(open, end string) []byte {
		n := 15_000/(len(open)+len(end)) - 10
		return []byte(`2["ping",` + strings.Repeat(open, n) + `1` + strings.Repeat(end, n) + `]`)
	}
	for _, tt := range []struct {
		name string
		text []byte
	}{
		{"string", fill(`2["ping","`, "x", `"]`)},
		{"numbers near zero", fill(`2["ping"`, ",2e-308", `]`)},
		{"numbers near zero in a join", fill(`2["join-session",{"sessionId":[1`, ",2e-308", `]}]`)},
		{"numbers near zero in an acknowledgement", fill(`31[1`, ",2e-308", `]`)},
		{"numbers near zero in an unknown event", fill(`2["x"`, ",2e-308", `]`)},
		{"digits", fill(`2["join-session",{"sessionId":`, "9", `}]`)},
		{"small numbers", fill(`2["ping"`, ",1", `]`)},
		{"empty lists", fill(`2["ping"`, ",[]", `]`)},
		{"nested lists", nested("[", "]")},
		{"nested objects", nested(`{"":`, "}")},
		{"keys", fill(`2["join-session",{"a":1`, `,"a":1`, `}]`)},
		{"the key", fill(`2["join-session",{"a":1`, `,"sessionId":1`, `}]`)},
		{"escapes", fill(`2["join",{"channel":"`, `\u0061`, `"}]`)},
		{"a long name", fill(`2["`, "x", `"]`)},
		{"brackets", fill(`2`, "[", ``)},
		{"a whisper", fill(`2["whisper",{"channel":"private-x","event":"e","data":[1`, ",2e-308", `]}]`)},
	} {
		b.Run(tt.name, func(b *testing.B) {
			s := newTestServer(b)
			for b.Loop() {
				c := &session{server: s}
				c.begin(`[]`)
				c.socketID = "x"
				c.onMessage(tt.text)
				c.abort(clientLeft)
			}
		})
	}
}

// Configuration

func TestLoadConfig(t *testing.T) {
	c, err := loadConfig(environment(nil))
	if err != nil {
		t.Fatal(err)
	}
	want := config{host: "127.0.0.1", port: 3001, maxConnections: 10000, pingInterval: 25 * time.Second, pingTimeout: 20 * time.Second,
		origins: []string{"http://localhost:8000", "http://127.0.0.1:8000", "http://localhost:5173", "http://127.0.0.1:5173"}}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("defaults:\ngot  %+v\nwant %+v", c, want)
	}
	c, err = loadConfig(environment([]string{"SOCKET_HOST=::1", "SOCKET_PORT=0", "SOCKETIO_SECRET=0123456789abcdef0123456789abcdef,fedcba9876543210fedcba9876543210", "LOG_LEVEL=debug",
		"CORS_ORIGINS=https://A.example, http://b.example:8080", "MAX_CONNECTIONS=5", "PING_INTERVAL=300ms", "PING_TIMEOUT=1m"}))
	if err != nil {
		t.Fatal(err)
	}
	want = config{host: "::1", secrets: []string{"0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"}, origins: []string{"https://a.example", "http://b.example:8080"},
		maxConnections: 5, pingInterval: 300 * time.Millisecond, pingTimeout: time.Minute, logLevel: slog.LevelDebug}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("all set:\ngot  %+v\nwant %+v", c, want)
	}
}

func TestLoadConfigRefuses(t *testing.T) {
	tests := []struct{ env, want string }{
		{"SOCKET_HOST=a b", `SOCKET_HOST: "a b" is not an address to listen on, such as 127.0.0.1 or ::1, without brackets`},
		{"SOCKET_HOST=[::]", `SOCKET_HOST: "[::]" is not an address to listen on, such as 127.0.0.1 or ::1, without brackets`},
		{"SOCKET_PORT=abc", `SOCKET_PORT: "abc" is not a port (0–65535)`},
		{"SOCKET_PORT=65536", `SOCKET_PORT: "65536" is not a port (0–65535)`},
		{"SOCKET_PORT=-1", `SOCKET_PORT: "-1" is not a port (0–65535)`},
		{"MAX_CONNECTIONS=0", `MAX_CONNECTIONS: "0" is not a number of connections (1–10000000)`},
		{"PING_INTERVAL=25", `PING_INTERVAL: "25" is not a duration from 100ms to 1h, such as 25s`},
		{"PING_TIMEOUT=-1s", `PING_TIMEOUT: "-1s" is not a duration from 100ms to 1h, such as 20s`},
		{"LOG_LEVEL=loud", `LOG_LEVEL: "loud" is not debug, info, warn or error`},
		{"LOG_LEVEL=warn+1", `LOG_LEVEL: "warn+1" is not debug, info, warn or error`},
		{"CORS_ORIGINS=example.com", `CORS_ORIGINS: "example.com" is not ` + originWanted},
		{"CORS_ORIGINS=https://a.example/", `CORS_ORIGINS: "https://a.example/" is not ` + originWanted},
		{"CORS_ORIGINS=https://a.example,,https://b.example", `CORS_ORIGINS: "" is not ` + originWanted},
		{"CORS_ORIGINS=https://user:tooshort@a.example", `CORS_ORIGINS: "…@a.example" is not ` + originWanted},
		{"CORS_ORIGINS=https://münchen.example", `CORS_ORIGINS: "https://münchen.example" is not ` + originWanted},
		{"SOCKETIO_SECRET=tooshort", secretRefusal},
		{`SOCKETIO_SECRET="tooshort-0123456789abcdef0123456789abcdef"`, secretRefusal},
		{`SOCKETIO_SECRET='tooshort-0123456789abcdef0123456789abcdef'`, secretRefusal},
		{`SOCKETIO_SECRET=0123456789abcdef0123456789abcdef,"tooshort-0123456789abcdef0123456789"`, secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdef0123456789abcde", secretRefusal}, // 31 characters
		{"SOCKETIO_SECRET=0123456789abcdef0123456789abcdef,tooshort", secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdef 0123456789abcdef", secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdef\t0123456789abcdef", secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdef\x7f0123456789abcdef", secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdefé0123456789abcdef", secretRefusal},
		{"SOCKETIO_SECRET=0123456789abcdef0123456789abcdef,0123456789abcdef0123456789abcdef,0123456789abcdef0123456789abcdef", secretRefusal},
		{"REDIS_URL=unix:///tooshort", redisRefusal},
		{"REDIS_URL=redis://:tooshort#@host:6379", redisRefusal},
		{"REDIS_URL=redis://:tooshort/@host:6379", redisRefusal},
		{"REDIS_URL=redis://:tooshort%@host:6379", redisRefusal},
		{"REDIS_URL=redis://:tooshort@host/notadatabase", redisRefusal},
	}
	var all, wants []string
	for _, tt := range tests {
		_, err := loadConfig(environment([]string{tt.env}))
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s:\ngot  %v\nwant %s", tt.env, err, tt.want)
		}
		if name, _, _ := strings.Cut(tt.env, "="); !slices.ContainsFunc(all, func(e string) bool { return strings.HasPrefix(e, name+"=") }) {
			all, wants = append(all, tt.env), append(wants, tt.want)
		}
	}
	_, err := loadConfig(environment(all))
	for _, want := range wants {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("all at once: %v lacks %q", err, want)
		}
	}
	if err != nil && strings.Contains(err.Error(), "tooshort") {
		t.Errorf("the secret is quoted: %v", err)
	}
}

const originWanted = "an origin as location.origin shows it in the page's console, such as https://example.com or http://localhost:8000, " +
	"nor https://*.example.com for all subdomains, nor * for any"

const redisRefusal = "REDIS_URL: want redis://[user:password@]host[:port][/database], or rediss:// for TLS; " +
	"in a password write # as %23, $ as %24, % as %25, & as %26, / as %2F and @ as %40"

const secretRefusal = "SOCKETIO_SECRET: want a secret of 32 or more printable ASCII characters, without white space and none of \"'`\\$&;|<>()#~, " +
	"not even quotation marks around it; or two secrets as new,old; make one with openssl rand -hex 32"

// TestSecretChange goes from the old secret to the new one: meanwhile both are good.
func TestSecretChange(t *testing.T) {
	const old, next = "the-old-secret-0123456789abcdef01234", "the-new-secret-0123456789abcdef01234"
	for _, step := range []struct {
		secrets string
		good    map[string]bool
	}{
		{old, map[string]bool{old: true, next: false}},
		{next + "," + old, map[string]bool{old: true, next: true}},
		{next, map[string]bool{old: false, next: true}},
	} {
		d := start(t, "SOCKETIO_SECRET="+step.secrets)
		c := d.dial("websocket")
		for secret, good := range step.good {
			status, _, _ := d.request("POST", "/broadcast", `{"channel":"admin-chat","event":"e"}`, "Authorization: Bearer "+secret)
			if (status == 200) != good {
				t.Errorf("SOCKETIO_SECRET=%s: bearer %s: got %d", step.secrets, secret, status)
			}
			answer, _ := c.call("join-session", fmt.Sprintf(`{"sessionId":"5","auth":%q}`, sign(secret, c.id, "chat-session.5")))
			if strings.HasPrefix(answer, `["joined-session"`) != good {
				t.Errorf("SOCKETIO_SECRET=%s: a join signed with %s: got %s", step.secrets, secret, answer)
			}
		}
		status, _, _ := d.request("POST", "/broadcast", `{"channel":"admin-chat","event":"e"}`, "Authorization: Bearer "+step.secrets)
		if whole := status == 200; whole != !strings.Contains(step.secrets, ",") {
			t.Errorf("SOCKETIO_SECRET=%s: the variable's whole value as bearer: got %d", step.secrets, status)
		}
	}
}

// TestOpenMode: everything works without a secret, for this machine alone.
func TestOpenMode(t *testing.T) {
	t.Parallel()
	d := start(t)
	d.logs.wait(t, `level=WARN msg="open mode: `)
	const body = `{"channel":"admin-chat","event":"e"}`
	if status, answer, _ := d.request("POST", "/broadcast", body); status != 200 {
		t.Errorf("local: got %d %s", status, answer)
	}
	for _, header := range []string{"X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1", "Forwarded: ",
		"X-Forwarded-For: ", "X-Forwarded-Host: localhost", "x-forwarded-proto: http", "X-Forwarded-Server: a", "X-Forwarded-Port: ",
		"Via: 1.1 a", "via: ", "X-REAL-IP: ", "CF-Connecting-IP: 127.0.0.1", "cf-connecting-ip: ", "True-Client-IP: 127.0.0.1", "True-Client-IP: ",
		"X-Client-IP: ", "Fastly-Client-IP: 127.0.0.1", "X-Envoy-External-Address: 127.0.0.1", "X-Forwarded: ", "X-Original-Forwarded-For: 127.0.0.1", "x-cluster-client-ip: "} {
		for _, path := range []string{"/broadcast", "/socket.io/?EIO=4&transport=polling"} {
			method := map[bool]string{true: "POST", false: "GET"}[path == "/broadcast"]
			status, answer, _ := d.request(method, path, body, header)
			if status != 403 || !strings.Contains(answer, "set SOCKETIO_SECRET") || !strings.Contains(answer, "Docker") {
				t.Errorf("%s with %s: got %d %s, want 403", path, header, status, answer)
			}
		}
		if status := (&client{t: t, d: d}).tryWebSocket("", header); status != 403 {
			t.Errorf("WebSocket with %s: got %d, want 403", header, status)
		}
	}
	d.logs.wait(t, `level=WARN msg="broadcast refused: not a local request, and SOCKETIO_SECRET is not set" addr=127.0.0.1`)
	d.logs.wait(t, `level=WARN msg="connection refused: not a local request, and SOCKETIO_SECRET is not set" addr=127.0.0.1`)
	for addr, want := range map[string]bool{"127.0.0.1:5": true, "127.8.9.1:5": true, "[::1]:5": true, "[::ffff:127.0.0.1]:5": true, "192.0.2.1:5": false, "[2001:db8::1]:5": false, "": false} {
		if got := isLocal(&http.Request{RemoteAddr: addr, Host: "127.0.0.1", Proto: "HTTP/1.1"}); got != want {
			t.Errorf("isLocal from %s: got %v", addr, got)
		}
	}
	for _, tt := range []struct {
		protocol, host string
		local          bool
	}{
		{"HTTP/1.1", "127.0.0.1", true},
		{"HTTP/1.1", "127.8.9.1:3001", true},
		{"HTTP/1.1", "[::1]:3001", true},
		{"HTTP/1.1", "[::1]", true},
		{"HTTP/1.1", "[::ffff:127.0.0.1]:3001", true},
		{"HTTP/1.1", "LocalHost:3001", true},
		{"HTTP/1.1", "chat.localhost", true},
		{"HTTP/1.0", "127.0.0.1", false}, // a bare proxy_pass, which has nginx pass on its own idea of Host
		{"HTTP/1.1", "", false},
		{"HTTP/1.1", "yourdomain.com", false},
		{"HTTP/1.1", "evil.example:3001", false},
		{"HTTP/1.1", "localhost.evil.example", false},
		{"HTTP/1.1", "notlocalhost", false},
		{"HTTP/1.1", "127.0.0.1.evil.example", false},
		{"HTTP/1.1", "192.0.2.1:3001", false},
		{"HTTP/1.1", "0.0.0.0:3001", false},
		{"HTTP/1.1", "host.docker.internal:3001", false},
		{"HTTP/1.1", "evil.com:.localhost", false}, // no port is .localhost
		{"HTTP/1.1", "evil.com:3001.localhost", false},
	} {
		for _, request := range []string{"GET " + handshakePath, "GET " + upgradePath, "POST /broadcast"} {
			rest, want := "\n", map[bool]int{true: 200, false: 403}[tt.local]
			switch {
			case strings.HasPrefix(request, "POST"):
				rest = fmt.Sprintf("Content-Length: %d\n\n%s", len(body), body)
			case request == "GET "+upgradePath:
				rest = strings.ReplaceAll(upgradeHeader, "\r", "") + rest
				if tt.local {
					want = 101
				}
			}
			status, answer, err := answer(d.raw(request + " " + tt.protocol + "\nHost: " + tt.host + "\n" + rest))
			if err != nil || status != want {
				t.Errorf("%s %s with Host: %s: got %d %s (%v), want %d", request, tt.protocol, tt.host, status, answer, err, want)
			}
		}
	}
}

func TestClientAddr(t *testing.T) {
	for _, tt := range []struct{ peer, realIP, forwardedFor, want string }{
		{"127.0.0.1:5", "", "", "127.0.0.1"},
		{"127.0.0.1:5", "192.0.2.1", "198.51.100.1", "192.0.2.1"},
		{"[::1]:5", "", "203.0.113.1, 198.51.100.1", "198.51.100.1"},
		{"127.0.0.1:5", "a\nb", "", "127.0.0.1"},
		{"127.0.0.1:5", "fe80::1%" + strings.Repeat("x", 20_000), "", "fe80::1"},
		{"127.0.0.1:5", "", "fe80::1%eth0", "fe80::1"},
		{"[fe80::2%eth0]:5", "", "", "fe80::2"},
		{"192.0.2.7:5", "198.51.100.1", "198.51.100.2", "192.0.2.7"}, // not a proxy of ours: its word doesn't count
	} {
		r := &http.Request{RemoteAddr: tt.peer, Header: http.Header{"X-Real-Ip": {tt.realIP}, "X-Forwarded-For": {tt.forwardedFor}}}
		if got := clientAddr(r); got != tt.want {
			t.Errorf("%+v: got %s", tt, got)
		}
	}
}

// Origins

func TestParseOrigin(t *testing.T) {
	for entry, want := range map[string]string{
		"*":                           "*",
		"https://example.com":         "https://example.com",
		"HTTPS://Example.COM":         "https://example.com",
		"https://example.com:443":     "https://example.com",
		"http://example.com:80":       "http://example.com",
		"http://example.com:443":      "http://example.com:443",
		"https://example.com:3001":    "https://example.com:3001",
		"https://xn--mnchen-3ya.de":   "https://xn--mnchen-3ya.de",
		"http://my_site.test.":        "http://my_site.test.",
		"http://192.0.2.1:8000":       "http://192.0.2.1:8000",
		"http://[::1]:80":             "http://[::1]",
		"http://[2001:DB8::1]:8000":   "http://[2001:db8::1]:8000",
		"capacitor://localhost":       "capacitor://localhost",
		"ionic://localhost":           "ionic://localhost",
		"tauri://localhost":           "tauri://localhost",
		"https://*.example.com":       "https://*.example.com",
		"https://*.Example.com:443":   "https://*.example.com",
		"http://*.localhost:8000":     "http://*.localhost:8000",
		"":                            "",
		"null":                        "",
		"example.com":                 "",
		"//example.com":               "",
		"localhost:8000":              "",
		"https://":                    "",
		"https://example.com/":        "",
		"https://example.com/chat":    "",
		"https://example.com?a=b":     "",
		"https://example.com?":        "",
		"https://example.com#a":       "",
		"https://example.com:99999":   "",
		"https://example.com:0":       "",
		"https://example.com:port":    "",
		"http://example.com:0080":     "",
		"https://user:pw@example.com": "",
		"https://user@example.com":    "",
		"https://exa mple.com":        "",
		"https://example..com":        "",
		"https://m%C3%BCnchen.de":     "",
		"http://127.1":                "",
		"http://256.0.0.1":            "",
		"http://[::1":                 "",
		"http://[0:0::1]":             "",
		"http://[fe80::1%25eth0]":     "",
		"https://münchen.de":          "",
		"https://\u212aelvin.example": "", // the sign of kelvin, whose lower case is a k
		"ftp://a.com":                 "",
		"file://":                     "file://",
		"app://.":                     "app://.",
		"APP://.":                     "app://.",
		"app://":                      "app://",
		"capacitor://":                "capacitor://",
		"file:///":                    "",
		"file://.:80":                 "",
		"app://:80":                   "",
		"app://./index.html":          "",
		"http://.":                    "",
		"https://.":                   "",
		"http://":                     "",
		"ws://":                       "",
		"ftp://.":                     "",
		"file:":                       "",
		"ws://example.com":            "",
		"wss://example.com":           "",
		"*.example.com":               "",
		"https://*":                   "",
		"https://ex*mple.com":         "",
		"https://*example.com":        "",
		"https://www.*.example.com":   "",
		"https://*.*.example.com":     "",
		"https://example.*":           "",
		"https://*.0.0.1":             "",
		"https://example.com:*":       "",
		"*://example.com":             "",
	} {
		if origin, ok := parseOrigin(entry); ok != (want != "") || ok && origin != want {
			t.Errorf("%s: got %q, %v, want %q", entry, origin, ok, want)
		}
		if _, err := loadConfig(environment([]string{"CORS_ORIGINS=https://other.example," + entry})); (err == nil) != (want != "") {
			t.Errorf("CORS_ORIGINS=%s: got %v", entry, err)
		}
	}
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	const listed, foreign = "Origin: https://shop.example", "Origin: https://evil.example"
	closed, any := start(t, "CORS_ORIGINS=https://shop.example"), start(t, "CORS_ORIGINS=*")
	for _, tt := range []struct {
		d      *daemon
		origin string
		status int
		allow  string
	}{
		{closed, "", 200, ""},
		{closed, listed, 200, "https://shop.example"},
		{closed, foreign, 403, ""},
		{closed, "Origin: null", 403, ""},
		{closed, listed + ".evil.example", 403, ""},
		{closed, "Origin: http://localhost:8000", 403, ""},
		{any, foreign, 200, "https://evil.example"},
		{any, "", 200, ""},
	} {
		ws := map[int]int{200: 101, 403: 403}[tt.status]
		if status := (&client{t: t, d: tt.d}).tryWebSocket("", tt.origin); status != ws {
			t.Errorf("WebSocket with %s: got %d, want %d", tt.origin, status, ws)
		}
		victim := tt.d.dial("polling")
		for path, method := range map[string]string{
			"/socket.io/?EIO=4&transport=polling":                         "GET",
			"/socket.io/?EIO=4&transport=polling&sid=" + victim.sid:       "POST",
			"/socket.io/?EIO=4&transport=polling&sid=" + victim.sid + "&": "OPTIONS",
		} {
			body := map[string]string{"POST": `42["ping"]`}[method]
			status, answer, header := tt.d.request(method, path, body, tt.origin)
			want := tt.status
			if method == "OPTIONS" && want == 200 {
				want = 204
			}
			if status != want || header.Get("Access-Control-Allow-Origin") != tt.allow || header.Get("Vary") != "Origin" {
				t.Errorf("%s with %s: got %d %s %v, want %d, allowed %q", method, tt.origin, status, answer, header, want, tt.allow)
			}
			if want := map[bool]string{true: "true"}[tt.allow != ""]; header.Get("Access-Control-Allow-Credentials") != want {
				t.Errorf("%s with %s: got %v, want credentials %q", method, tt.origin, header, want)
			}
		}
		if status := (&client{t: t, d: tt.d}).tryWebSocket(victim.sid, tt.origin); status != ws {
			t.Errorf("upgrade with %s: got %d, want %d", tt.origin, status, ws)
		}
	}
	closed.logs.wait(t, `level=WARN msg="origin refused: add it to CORS_ORIGINS if it is yours" origin=https://evil.example addr=127.0.0.1`)
	if n := strings.Count(closed.logs.String(), "origin refused"); n > int(patience/time.Second) {
		t.Errorf("%d warnings of refused origins, want one a second at most", n)
	}
	if status, _, _ := closed.request("GET", "/health", "", foreign); status != 200 {
		t.Errorf("/health with an origin: got %d", status)
	}
}

// TestAllowedOrigins is the contract's section Origins, row by row, and what is near to each row and not meant.
func TestAllowedOrigins(t *testing.T) {
	t.Parallel()
	const secured = "SOCKETIO_SECRET=" + testSecret
	daemons := make(map[string]*daemon)
	for _, tt := range []struct {
		mode, list, host, origin string
		allowed                  bool
	}{
		// Not a browser.
		{secured, "https://shop.example", "chat.example", "", true},
		{"", "https://shop.example", "localhost:3001", "", true},

		// In the list, as browsers send it.
		{secured, "https://shop.example", "chat.example", "https://shop.example", true},
		{secured, "https://SHOP.example:443", "chat.example", "https://shop.example", true},
		{secured, "https://shop.example", "chat.example", "https://shop.example:443", true}, // no browser's, but means the same
		{secured, "http://shop.example:80", "chat.example", "http://shop.example", true},
		{secured, "https://shop.example:8443", "chat.example", "https://shop.example:8443", true},
		{secured, "https://shop.example", "chat.example", "http://shop.example", false},
		{secured, "https://shop.example", "chat.example", "https://shop.example:8443", false},
		{secured, "https://shop.example", "chat.example", "https://www.shop.example", false},
		{secured, "https://shop.example", "chat.example", "https://shop.example.evil.example", false},
		{secured, "https://shop.example", "chat.example", "https://shop.example@evil.example", false},
		{secured, "https://shop.example", "chat.example", "https://evil.example/https://shop.example", false},
		{secured, "https://shop.example", "chat.example", "null", false},
		{secured, "https://shop.example", "chat.example", "*", false},
		{secured, "https://shop.example,capacitor://localhost", "chat.example", "capacitor://localhost", true},
		{secured, "ionic://localhost,tauri://localhost", "chat.example", "tauri://localhost", true},
		{secured, "ionic://localhost,tauri://localhost", "chat.example", "ionic://localhost", true},
		{secured, "https://shop.example", "chat.example", "capacitor://localhost", false},
		{secured, "file://", "chat.example", "file://", true}, // Chromium's files, Cordova, arduinoWebSockets
		{secured, "file://", "chat.example", "null", false},
		{secured, "file://", "chat.example", "file://evil.example", false},
		{secured, "app://.", "chat.example", "app://.", true}, // Electron
		{secured, "app://.", "chat.example", "app://evil.example", false},
		{secured, "https://shop.example", "chat.example", "file://", false},
		{secured, "https://xn--mnchen-3ya.de", "chat.example", "https://xn--mnchen-3ya.de", true},
		{"", "", "127.0.0.1:3001", "http://localhost:5173", true},
		{"", "", "127.0.0.1:3001", "http://127.0.0.1:8000", true},
		{"", "", "127.0.0.1:3001", "http://localhost:9999", false},

		// A wildcard.
		{secured, "https://*.example.com", "chat.example", "https://a.example.com", true},
		{secured, "https://*.example.com", "chat.example", "https://a.b.example.com", true},
		{secured, "https://*.Example.com:443", "chat.example", "https://a.example.com", true},
		{secured, "https://*.example.com:8443", "chat.example", "https://a.example.com:8443", true},
		{secured, "https://*.example.com", "chat.example", "https://example.com", false},
		{secured, "https://*.example.com", "chat.example", "https://.example.com", false},
		{secured, "https://*.example.com", "chat.example", "https://badexample.com", false},
		{secured, "https://*.example.com", "chat.example", "http://a.example.com", false},
		{secured, "https://*.example.com", "chat.example", "https://a.example.com:8443", false},
		{secured, "https://*.example.com:8443", "chat.example", "https://a.example.com", false},
		{secured, "https://*.example.com", "chat.example", "https://a.example.com.evil.example", false},
		{secured, "https://*.example.com", "chat.example", "https://evil.example/.example.com", false},
		{secured, "https://*.example.com", "chat.example", "https://evil.example:1.example.com", false},

		// Any.
		{secured, "*", "chat.example", "https://evil.example", true},
		{secured, "https://shop.example,*", "chat.example", "https://evil.example", true},
		{secured, "*", "chat.example", "null", true},
		{"", "*", "localhost:3001", "https://evil.example", true},

		// The server's own.
		{secured, "https://shop.example", "chat.example", "https://chat.example", true},
		{secured, "https://shop.example", "chat.example", "http://chat.example", true}, // Host does not tell the scheme
		{secured, "https://shop.example", "chat.example:443", "https://chat.example", true},
		{secured, "https://shop.example", "chat.example", "https://chat.example:443", true},
		{secured, "https://shop.example", "chat.example:80", "http://chat.example", true},
		{secured, "https://shop.example", "Chat.Example:3001", "https://chat.example:3001", true},
		{secured, "https://shop.example", "192.0.2.1:3001", "http://192.0.2.1:3001", true},
		{secured, "https://shop.example", "[2001:db8::1]:3001", "http://[2001:db8::1]:3001", true},
		{secured, "https://shop.example", "chat.example:3001", "https://chat.example", false},
		{secured, "https://shop.example", "chat.example", "https://chat.example:3001", false},
		{secured, "https://shop.example", "chat.example:80", "https://chat.example", false},
		{secured, "https://shop.example", "chat.example", "https://www.chat.example", false},
		{secured, "https://shop.example", "chat.example", "https://evil.example", false},
		{"", "https://shop.example", "localhost:3001", "http://localhost:3001", true},
		{"", "https://shop.example", "127.0.0.1:3001", "http://127.0.0.1:3001", true},
		{"", "https://shop.example", "[::1]:3001", "http://[::1]:3001", true},
		{"", "https://shop.example", "localhost", "https://localhost:443", true},
		{"", "https://shop.example", "127.0.0.1:3001", "http://localhost:3001", false},
		{"", "https://shop.example", "chat.localhost:3001", "http://chat.localhost:3001", false}, // a local request, but not by DNS' word
		{"", "https://shop.example", "evil.example:3001", "http://evil.example:3001", false},     // a name that has been rebound
		{"", "https://shop.example", "evil.example:3001", "", false},
		{"", "*", "evil.example:3001", "http://evil.example:3001", false},
	} {
		d := daemons[tt.mode+tt.list]
		if d == nil {
			d = start(t, tt.mode, "CORS_ORIGINS="+tt.list)
			daemons[tt.mode+tt.list] = d
		}
		headers := " HTTP/1.1\nHost: " + tt.host + "\n"
		if tt.origin != "" {
			headers += "Origin: " + tt.origin + "\n"
		}
		for request, want := range map[string]int{
			"GET " + handshakePath + headers + "\n":               200,
			"GET " + upgradePath + headers + upgradeHeader + "\n": 101,
			"OPTIONS " + handshakePath + headers + "\n":           204,
		} {
			if !tt.allowed {
				want = 403
			}
			resp, err := http.ReadResponse(bufio.NewReader(d.raw(strings.ReplaceAll(request, "\r", ""))), nil)
			if err != nil || resp.StatusCode != want {
				t.Errorf("%+v: %.7s: got %v (%v), want %d", tt, request, resp, err, want)
				continue
			}
			allow := ""
			if tt.allowed {
				allow = tt.origin
			}
			if got := resp.Header.Get("Access-Control-Allow-Origin"); want != 101 && got != allow {
				t.Errorf("%+v: %.7s: got Access-Control-Allow-Origin: %s", tt, request, got)
			}
		}
	}
}

// TestCrossSiteWithoutOrigin: an <img> on any page sends Sec-Fetch-Site without Origin, the client on another site's page both.
func TestCrossSiteWithoutOrigin(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"", "SOCKETIO_SECRET=" + testSecret} {
		d := start(t, mode, "CORS_ORIGINS=*")
		for _, tt := range []struct {
			site, origin string
			status       int
		}{
			{"cross-site", "", 403},
			{"cross-site", "Origin: ", 403},
			{"cross-site", "Origin: http://localhost:8000", 200},
			{"same-site", "", 200},
			{"same-origin", "", 200},
			{"none", "", 200}, // the address bar
		} {
			site := "Sec-Fetch-Site: " + tt.site
			if status, answer, _ := d.request("GET", handshakePath, "", site, tt.origin); status != tt.status {
				t.Errorf("%q: %+v: got %d %s", mode, tt, status, answer)
			}
			if status := (&client{t: t, d: d}).tryWebSocket("", site, tt.origin); (status == 101) != (tt.status == 200) {
				t.Errorf("%q: %+v: WebSocket: got %d", mode, tt, status)
			}
		}
		if got := d.health("connections"); got != 8 {
			t.Errorf("%q: %d connections, want 8", mode, got)
		}
	}
}

// TestLongOrigin: what is longer than any name is no origin, and costs nothing.
func TestLongOrigin(t *testing.T) {
	t.Parallel()
	d := start(t, "CORS_ORIGINS=https://*.example.com")
	origin := func(size int) string {
		const around = "https://.example.com"
		return "Origin: https://" + strings.Repeat("a", size-len(around)) + ".example.com"
	}
	for size, want := range map[int]int{maxOrigin: 200, maxOrigin + 1: 403, 12 << 10: 403} {
		if status, _, _ := d.request("GET", handshakePath, "", origin(size)); status != want {
			t.Errorf("%d bytes: got %d, want %d", size, status, want)
		}
	}
}

// HTTP

func TestBroadcast(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		guest, both, admin, stranger := d.dial(transport), d.dial(transport), d.dial(transport), d.dial(transport)
		guest.join("5")
		both.join("5")
		both.join("6")
		both.joinAdmin()
		admin.joinAdmin()
		stranger.join("7")
		for _, tt := range []struct {
			body                string
			delivered           int
			guest, both, admin_ bool
		}{
			{`{"channel":"chat-session.5","event":"m","data":1}`, 3, true, true, true},
			{`{"channel":"private-chat-session.5","event":"m","data":2}`, 3, true, true, true},
			{`{"channel":"presence-chat-session.5","event":"m","data":3}`, 3, true, true, true},
			{`{"channel":"admin-chat","event":"m","data":4}`, 2, false, true, true},
			{`{"channels":["chat-session.5","chat-session.6","private-admin-chat"],"event":"m","data":5}`, 3, true, true, true},
			{`{"channel":"chat-session.5","event":"m","data":6,"socket":"` + both.id + `"}`, 2, true, false, true},
			{`{"channel":"chat-session.5","event":"m","data":7,"socket":"unknown"}`, 3, true, true, true},
			{`{"channel":"chat-session.5","event":"m","data":7,"socket":"` + strings.Repeat("x", 100*maxSocketID) + `"}`, 3, true, true, true}, // a page sends what it likes
			{`{"channel":"chat-session.empty","event":"m","data":8}`, 2, false, true, true},
			{`{"channel":"chat-session.5","event":"m","data":9,"socket":"undefined"}`, 3, true, true, true}, // X-Socket-ID of a page that has not connected
		} {
			if got := d.broadcast(tt.body); got != tt.delivered {
				t.Errorf("%s: %s: delivered %d, want %d", transport, tt.body, got, tt.delivered)
			}
			data := regexp.MustCompile(`"data":(\d)`).FindStringSubmatch(tt.body)[1]
			for c, want := range map[*client]bool{guest: tt.guest, both: tt.both, admin: tt.admin_} {
				if want {
					c.expect(`42["m",` + data + `]`) // once: the next one has to come next
				}
			}
		}
		stranger.expectNothing("7")
		admin.expect(`42["marker"`)
		both.expect(`42["marker"`)
		guest.emit("leave-session", `{"sessionId":5}`)
		guest.expect(`42["left-session",{"roomName":"session-5","sessionId":5}]`)
		if got := d.broadcast(`{"channel":"chat-session.5","event":"m"}`); got != 2 {
			t.Errorf("%s: after one left: delivered %d, want 2", transport, got)
		}
		both.expect(`42["m",{}]`)
		both.emit("leave-admin") // still in the sessions, hence one copy
		both.expect(`42["left-admin",{"room":"admin-room"}]`)
		admin.expect(`42["m",{}]`)
		admin.emit("leave-admin")
		admin.expect(`42["left-admin",{"room":"admin-room"}]`)
		if delivered, admins := d.broadcast(`{"channels":["admin-chat","chat-session.5"],"event":"m"}`), d.health("admins"); delivered != 1 || admins != 0 {
			t.Errorf("%s: after the admins left: delivered %d, want 1; %d admins", transport, delivered, admins)
		}
		both.expect(`42["m",{}]`)
		for _, c := range []*client{both, admin} { // and nothing else came
			c.emit("ping")
			c.expect(`42["pong"`)
		}
		guest.emit("ping")
		guest.expect(`42["pong"`)
		for _, c := range []*client{guest, both, admin, stranger} {
			c.end()
		}
		d.waitHealth("connections", 0)
	}
}

// TestDataIsExact: what Laravel sends arrives byte for byte.
func TestDataIsExact(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		for _, data := range []string{
			`9007199254740993`, `1.10`, `-0.0`, `1E400`, `{"z":1,"a":{"y":[],"b":{}},"z":2}`, "\"\u2028\u2029\"", `"😀 <b>&amp;</b> \ud83d\ude00 \/"`, `"a lone string"`,
			`null`, `true`, `[]`, `{ "spaced" : [ 1 , 2 ] }`, `"` + strings.Repeat("long ", 20000) + `"`, `"\ud800"`,
		} {
			d.broadcast(`{"channel":"chat-session.5","event":"message.sent","data":` + data + `}`)
			c.expect(`42["message.sent",` + data + `]`)
		}
		d.broadcast(`{"channel":"chat-session.5","event":"message.sent"}`)
		c.expect(`42["message.sent",{}]`)
		d.broadcast(`{"channel":"chat-session.5","event":"App\\Events\\Sent \"é\u2028😀","data":1}`)
		var event []any
		if err := json.Unmarshal([]byte(c.expect("42")), &event); err != nil || event[0] != "App\\Events\\Sent \"é\u2028😀" {
			t.Errorf("%s: event name: got %v (%v)", transport, event, err)
		}
	}
}

func TestBroadcastRefuses(t *testing.T) {
	t.Parallel()
	open, secured := start(t), start(t, "SOCKETIO_SECRET="+testSecret)
	const good = `{"channel":"chat-session.5","event":"e"}`
	bearer := "Authorization: Bearer " + testSecret
	padding := func(size int) string { // a good body of that many bytes
		const frame = `{"channel":"chat-session.5","event":"e","data":""}`
		return strings.Replace(frame, `""`, `"`+strings.Repeat("x", size-len(frame))+`"`, 1)
	}
	many := func(n int) string {
		return `{"channels":["admin-chat"` + strings.Repeat(`,"admin-chat"`, n-1) + `],"event":"e"}`
	}
	const notUTF8, notObject = "the body is not UTF-8", "the body has to be a JSON object"
	const wantChannel = "channel has to be a string, such as chat-session.5 or private-orders.5"
	const wantChannels = "channels has to be a list of 1 to 100 channel names"
	const wantEvent = "event has to be a string of 1 to 200 characters"
	const wantReconnect = "reconnect takes the place of event and data: leave them out"
	noName := func(channel string) string {
		return fmt.Sprintf("channel %q: a channel's name has 1 to 164 characters of A-Z a-z 0-9 _ - = @ , . ;", channel)
	}
	copies := func(channels, size int) string { // of data of that size
		names := strings.Repeat(`,"chat-session.5"`, 20) // of which none needs a copy
		for i := range channels {
			names += fmt.Sprintf(`,"c%d"`, i)
		}
		return `{"channels":[` + names[1:] + `],"event":"e","data":"` + strings.Repeat("x", size-2) + `"}`
	}
	for _, tt := range []struct {
		name, body string
		header     string
		status     int
		want       string // the error; empty: success
	}{
		{"good", good, bearer, 200, ""},
		{"largest", padding(maxBody), bearer, 200, ""},
		{"most channels", many(100), bearer, 200, ""},
		{"longest event", `{"channel":"admin-chat","event":"` + strings.Repeat("é", 200) + `"}`, bearer, 200, ""},
		{"unknown fields", `{"channel":"admin-chat","event":"e","Channel":"x","more":1}`, bearer, 200, ""},
		{"nulls", `{"channel":"admin-chat","channels":null,"socket":null,"event":"e"}`, bearer, 200, ""},

		{"too large", padding(maxBody + 1), bearer, 413, "the body is over 1048576 bytes"},
		{"empty", ``, bearer, 400, notObject},
		{"not JSON", `channel=x`, bearer, 400, notObject},
		{"cut off", `{"channel":"admin-chat","event":"e"`, bearer, 400, notObject},
		{"two objects", good + good, bearer, 400, notObject},
		{"a list", `[` + good + `]`, bearer, 400, notObject},
		{"null", `null`, bearer, 400, notObject},
		{"invalid UTF-8", `{"channel":"admin-chat","event":"e","data":"` + "\xff" + `"}`, bearer, 400, notUTF8},
		{"too deep", `{"channel":"admin-chat","event":"e","data":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`, bearer, 400, notObject},
		{"no channel", `{"event":"e"}`, bearer, 400, wantChannel},
		{"channel null", `{"channel":null,"event":"e"}`, bearer, 400, wantChannel},
		{"channel a number", `{"channel":5,"event":"e"}`, bearer, 400, wantChannel},
		{"both", `{"channel":"admin-chat","channels":["admin-chat"],"event":"e"}`, bearer, 400, "give channel or channels, not both"},
		{"channels empty", `{"channels":[],"event":"e"}`, bearer, 400, wantChannels},
		{"channels a string", `{"channels":"admin-chat","event":"e"}`, bearer, 400, wantChannels},
		{"channels of numbers", `{"channels":[5],"event":"e"}`, bearer, 400, wantChannels},
		{"too many channels", many(101), bearer, 400, wantChannels},
		{"any channel", `{"channel":"other","event":"e"}`, bearer, 200, ""},
		{"longest channel", `{"channel":"` + strings.Repeat("a", 164) + `","event":"e"}`, bearer, 200, ""},
		{"presence channel", `{"channel":"presence-x","event":"e"}`, bearer, 200, ""},
		{"a BOM", "\ufeff" + good, bearer, 200, ""},
		{"most copies", copies(80, maxCopies/80), bearer, 200, ""},
		{"too many copies", copies(80, maxCopies/80+1), bearer, 400, "data for 80 channels is over 8388608 bytes: each channel gets a copy"},
		{"channel empty", `{"channel":"","event":"e"}`, bearer, 400, noName("")},
		{"channel too long", `{"channel":"` + strings.Repeat("a", 165) + `","event":"e"}`, bearer, 400, noName(strings.Repeat("a", 165))},
		{"one of two is no name", `{"channels":["admin-chat","a b"],"event":"e"}`, bearer, 400, noName("a b")},
		{"session id", `{"channel":"chat-session.a:b","event":"e"}`, bearer, 400, noName("chat-session.a:b")},
		{"long session id", `{"channel":"chat-session.` + strings.Repeat("a", 129) + `","event":"e"}`, bearer, 400,
			`channel "chat-session.` + strings.Repeat("a", 129) + `": sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;`},
		{"no session id", `{"channel":"chat-session.","event":"e"}`, bearer, 400, `channel "chat-session.": sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;`},
		{"no event", `{"channel":"admin-chat"}`, bearer, 400, wantEvent},
		{"event empty", `{"channel":"admin-chat","event":""}`, bearer, 400, wantEvent},
		{"event a number", `{"channel":"admin-chat","event":1}`, bearer, 400, wantEvent},
		{"event too long", `{"channel":"admin-chat","event":"` + strings.Repeat("é", 201) + `"}`, bearer, 400, wantEvent},
		{"reconnect", `{"channels":["admin-chat","x"],"reconnect":true}`, bearer, 200, ""},
		{"no reconnect", `{"channel":"admin-chat","reconnect":false,"event":"e"}`, bearer, 200, ""},
		{"no reconnect and no event", `{"channel":"admin-chat","reconnect":false}`, bearer, 400, wantEvent},
		{"reconnect null", `{"channel":"admin-chat","reconnect":null,"event":"e"}`, bearer, 200, ""},
		{"reconnect and event", `{"channel":"admin-chat","reconnect":true,"event":"e"}`, bearer, 400, wantReconnect},
		{"reconnect and data", `{"channel":"admin-chat","reconnect":true,"data":{}}`, bearer, 400, wantReconnect},
		{"reconnect a text", `{"channel":"admin-chat","reconnect":"true"}`, bearer, 400, "reconnect has to be true or false"},
		{"reconnect a number", `{"channel":"admin-chat","reconnect":1,"event":"e"}`, bearer, 400, "reconnect has to be true or false"},
		{"reconnect of no channel", `{"reconnect":true}`, bearer, 400, wantChannel},
		{"reconnect of what is no name", `{"channel":"a b","reconnect":true}`, bearer, 400, noName("a b")},
		{"reconnect without a token", `{"channel":"admin-chat","reconnect":true}`, "", 401, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"},
		{"socket a number", `{"channel":"admin-chat","event":"e","socket":1}`, bearer, 400, "socket has to be a string: the Socket.IO id that is to be left out"},

		{"no token", good, "", 401, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"},
		{"wrong token", good, bearer + "x", 401, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"},
		{"half a token", good, bearer[:len(bearer)-1], 401, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"},
		{"another scheme", good, "Authorization: Basic " + testSecret, 401, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"},
		{"a browser", good, "Origin: http://localhost:8000", 403, "browsers may not broadcast: post to your Laravel application instead"},
	} {
		status, answer, header := secured.request("POST", "/broadcast", tt.body, tt.header)
		want := `{"delivered":0,"message":"Message broadcasted","success":true}` + "\n"
		if tt.want != "" {
			message, _ := json.Marshal(tt.want)
			want = `{"error":` + string(message) + `,"success":false}` + "\n"
		}
		if status != tt.status || answer != want {
			t.Errorf("%s: got %d %s\nwant %d %s", tt.name, status, answer, tt.status, want)
		}
		if got := header.Get("Content-Type"); got != "application/json" {
			t.Errorf("%s: Content-Type %q", tt.name, got)
		}
		if authenticate := header.Get("WWW-Authenticate"); (status == 401) != (authenticate == "Bearer") {
			t.Errorf("%s: WWW-Authenticate %q", tt.name, authenticate)
		}
	}
	for event := range map[string]bool{"connect": true, "connect_error": true, "disconnect": true, "disconnecting": true, "newListener": true, "removeListener": true} {
		status, answer, _ := open.request("POST", "/broadcast", `{"channel":"admin-chat","event":"`+event+`"}`)
		if status != 400 || !strings.Contains(answer, "is reserved by Socket.IO") {
			t.Errorf("event %s: got %d %s", event, status, answer)
		}
	}
	for _, method := range []string{"GET", "PUT", "OPTIONS", "DELETE"} {
		status, answer, header := open.request(method, "/broadcast", good)
		if status != 405 || header.Get("Allow") != "POST" || answer != `{"error":"post it: POST /broadcast","success":false}`+"\n" {
			t.Errorf("%s: got %d %s, Allow: %q, want 405 and POST", method, status, answer, header.Get("Allow"))
		}
	}
	if status, answer, _ := open.request("POST", "/broadcast/", good); status != 200 {
		t.Errorf("/broadcast/: got %d %s, want 200", status, answer)
	}
	if status, answer, _ := open.request("POST", "/broadcast/x", good); status != 404 || answer != `{"error":"post to /broadcast","success":false}`+"\n" {
		t.Errorf("/broadcast/x: got %d %s, want 404", status, answer)
	}
	for encoding, want := range map[string]int{"gzip": 415, "br": 415, "identity": 200} {
		status, answer, _ := open.request("POST", "/broadcast", good, "Content-Encoding: "+encoding)
		if status != want || status != 200 && answer != `{"error":"send the body as it is, without Content-Encoding","success":false}`+"\n" {
			t.Errorf("Content-Encoding: %s: got %d %s, want %d", encoding, status, answer, want)
		}
	}
	if l := secured.logs.String(); strings.Contains(l, testSecret) {
		t.Errorf("the log has the secret:\n%s", l)
	}
}

// TestReconnect: who is in the rooms is sent away behind what waits for it, in such a way that it comes back by itself.
func TestReconnect(t *testing.T) {
	t.Parallel()
	d := start(t, "SOCKETIO_SECRET="+testSecret, "LOG_LEVEL=debug")
	for _, transport := range transportNames {
		for _, tt := range []struct {
			fields string
			ends   []string
		}{
			{`"channel":"chat-session.5"`, []string{"session 5", "private-chat-session.5"}},
			{`"channel":"private-chat-session.5"`, []string{"session 5", "private-chat-session.5"}},
			{`"channel":"admin-chat"`, []string{"admin", "private-admin-chat"}},
			{`"channel":"private-x"`, []string{"private-x"}},
			{`"channel":"x"`, []string{"x"}},
			{`"channel":"presence-x"`, nil},
			{`"channel":"nobody"`, nil},
			{`"channels":["chat-session.5","private-x","x"]`, []string{"session 5", "private-chat-session.5", "private-x", "x"}},
			{`"channels":["admin-chat","chat-session.5"]`, []string{"session 5", "private-chat-session.5", "admin", "private-admin-chat"}},
			{`"channel":"x","event":null,"data":null`, []string{"x"}},
		} {
			clients := make(map[string]*client)
			for _, channel := range []string{"private-x", "x", "private-chat-session.5", "private-admin-chat", "private-chat-session.6"} {
				clients[channel] = d.dial(transport)
				clients[channel].joinChannel(channel)
			}
			for _, name := range []string{"session 5", "session 6", "admin", "stranger"} {
				clients[name] = d.dial(transport)
				if session, ok := strings.CutPrefix(name, "session "); ok {
					clients[name].join(session)
				}
			}
			clients["admin"].joinAdmin()
			if n := d.broadcast(`{` + tt.fields + `,"reconnect":true}`); n != len(tt.ends) {
				t.Errorf("%s: %s: delivered %d, want %d", transport, tt.fields, n, len(tt.ends))
			}
			for name, c := range clients {
				if !slices.Contains(tt.ends, name) {
					c.emit("ping")
					c.expect(`42["pong"`)
					c.end()
					continue
				}
				packet, err := c.next()
				if transport == "polling" && packet != "1" || transport != "polling" && (err != io.EOF || !bytes.Equal(c.closing, []byte{1001 >> 8, 1001 & 0xff})) {
					t.Errorf("%s: %s: %s: got %q, %v, close frame % x, want an end", transport, tt.fields, name, packet, err, c.closing)
				}
				if c.conn != nil {
					c.conn.Close()
				}
				d.logs.wait(t, `msg=disconnected id=`+c.id+` addr=127.0.0.1 reason="forced server close"`)
			}
			d.waitHealth("connections", 0)
		}
	}
}

// TestReconnectBehind: what waits for a member leaves before its connection ends.
func TestReconnectBehind(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		d.fill(c, "5")
		if n := d.broadcast(`{"channel":"chat-session.5","reconnect":true}`); n != 1 {
			t.Errorf("%s: delivered %d, want 1", transport, n)
		}
		read := make(chan struct{})
		go func() { // it has closeTimeout
			defer close(read)
			c.expectFilling()
			if packet, err := c.next(); err == nil && packet != "1" {
				t.Errorf("%s: got %.50s, want the end", transport, packet)
			}
		}()
		d.waitHealth("sessions", 0)
		if n := d.broadcast(`{"channel":"chat-session.5","event":"late"}`); n != 0 {
			t.Errorf("%s: delivered %d to who ends", transport, n)
		}
		<-read
		if c.conn != nil {
			c.conn.Close()
		}
		d.waitHealth("connections", 0)
	}
}

// TestReconnectLeavesOut: toOthers() holds for this, too.
func TestReconnectLeavesOut(t *testing.T) {
	t.Parallel()
	d := start(t)
	admin, other := d.dial("websocket"), d.dial("websocket")
	for _, c := range []*client{admin, other} {
		c.joinAdmin()
	}
	if n := d.broadcast(`{"channel":"admin-chat","reconnect":true,"socket":"` + admin.id + `"}`); n != 1 {
		t.Errorf("delivered %d, want 1", n)
	}
	other.gone()
	admin.emit("ping")
	admin.expect(`42["pong"`)
}

// TestReconnectOfMany: they would all come back at once, so they are spread over refreshSpread.
func TestReconnectOfMany(t *testing.T) {
	t.Parallel()
	d := start(t, unhurried)
	for _, tt := range []struct {
		members     int
		least, most time.Duration // until half of them have ended
	}{
		{maxAtOnce, 0, refreshSpread / 4},
		{maxAtOnce + 50, refreshSpread / 4, refreshSpread * 3 / 4},
	} {
		ends := make(chan time.Time, tt.members)
		members := make([]*client, tt.members)
		for i := range members {
			members[i] = d.dial("websocket")
			members[i].join("5")
		}
		for _, c := range members {
			go func() {
				defer func() { ends <- time.Now() }() // even if it does not end
				c.gone()
			}()
		}
		began := time.Now()
		if n := d.broadcast(`{"channel":"chat-session.5","reconnect":true}`); n != tt.members {
			t.Errorf("delivered %d, want %d", n, tt.members)
		}
		var took []time.Duration
		for range tt.members {
			took = append(took, (<-ends).Sub(began))
		}
		slices.Sort(took)
		if half := took[tt.members/2]; half < tt.least || half > tt.most {
			t.Errorf("half of %d have ended after %v, want %v to %v", tt.members, half, tt.least, tt.most)
		}
		if last := took[tt.members-1]; last > refreshSpread+patience/4 {
			t.Errorf("the last of %d has ended after %v", tt.members, last)
		}
	}
}

// publicHealth is all that /health tells anybody who is not on this machine.
func publicHealth(status string) *regexp.Regexp {
	return regexp.MustCompile(`^{"status":"` + status + `","timestamp":"[^"]*"}\n$`)
}

func TestHealth(t *testing.T) {
	t.Parallel()
	d := start(t)
	clients := []*client{d.dial("websocket"), d.dial("polling"), d.dial("websocket")}
	clients[0].join("5")
	clients[1].join("5")
	clients[1].join("6")
	clients[2].joinAdmin()
	d.broadcast(`{"channel":"chat-session.5","event":"m"}`)
	d.broadcast(`{"channel":"chat-session.9","event":"m"}`)
	status, answer, header := d.request("GET", "/health", "")
	var got map[string]any
	if err := json.Unmarshal([]byte(answer), &got); err != nil || status != 200 || header.Get("Content-Type") != "application/json" {
		t.Fatalf("got %d %s %v", status, answer, header)
	}
	if at, err := time.Parse("2006-01-02T15:04:05.000Z", fmt.Sprint(got["timestamp"])); err != nil || time.Since(at) > patience {
		t.Errorf("timestamp: %v (%v)", got["timestamp"], err)
	}
	if memory, _ := got["memory"].(float64); memory < 1<<20 || memory > 1<<32 {
		t.Errorf("memory: %v bytes", got["memory"])
	}
	delete(got, "timestamp")
	delete(got, "memory")
	want := map[string]any{"status": "ok", "connections": 3.0, "sessions": 2.0, "admins": 1.0, "version": "dev", "uptime": 0.0, "broadcasts": 2.0, "deliveries": 4.0, "dropped": 0.0,
		"max_connections": 10000.0, "refused_joins": 0.0, "refused_origins": 0.0, "refused_tokens": 0.0, "refused_handshakes": 0.0}
	if uptime, _ := got["uptime"].(float64); uptime > 0 && uptime < 60 { // a slow machine
		want["uptime"] = uptime
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	for _, proxied := range []string{"X-Real-IP: 192.0.2.1", "X-Forwarded-For: 127.0.0.1", "Via: 1.1 proxy"} {
		if status, answer, _ := d.request("GET", "/health", "", proxied); status != 200 || !publicHealth("ok").MatchString(answer) {
			t.Errorf("%s: got %d %s", proxied, status, answer)
		}
	}
	for _, c := range clients {
		c.end()
	}
	for _, field := range []string{"connections", "sessions", "admins"} {
		d.waitHealth(field, 0)
	}
	if status, _, header := d.request("POST", "/health", ""); status != 405 || header.Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: got %d, Allow: %q", status, header.Get("Allow"))
	}
}

// TestRefusalsAreCounted: so that an alert can be made of them.
func TestRefusalsAreCounted(t *testing.T) {
	t.Parallel()
	d := start(t, "SOCKETIO_SECRET="+testSecret, "CORS_ORIGINS=https://shop.example", "MAX_CONNECTIONS=1")
	c := d.dial("websocket")
	c.join("5")
	for range 2 {
		c.call("join-session", `{"sessionId":"6"}`)
	}
	for range 3 {
		d.request("GET", handshakePath, "", "Origin: https://evil.example")
	}
	for range 4 {
		d.request("POST", "/broadcast", "{}")
	}
	for range 5 {
		d.request("GET", handshakePath, "")
	}
	for field, want := range map[string]int{"max_connections": 1, "refused_joins": 2, "refused_origins": 3, "refused_tokens": 4, "refused_handshakes": 5} {
		if got := d.health(field); got != want {
			t.Errorf("%s: got %d, want %d", field, got, want)
		}
	}
}

// TestOtherPaths: the client is not served, and a query that nginx may read in another way is refused.
func TestOtherPaths(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, path := range []string{"/socket.io/socket.io.js", "/socket.io/socket.io.min.js", "/socket.io/x/?EIO=4&transport=polling"} {
		status, answer, _ := d.request("GET", path, "")
		if status != 404 || answer != "the client is not served here: take dist/socket.io.min.js of the npm package socket.io-client\n" {
			t.Errorf("%s: got %d %s, want 404", path, status, answer)
		}
	}
	for _, query := range []string{"EIO=4&transport=polling&sid=x;", "EIO=4&transport=polling&a=b;c", "EIO=4&transport=polling&sid=%zz", "EIO=4&transport=polling&x=%",
		"EIO=4&transport=polling&x=" + strings.Repeat("x", maxQuery)} {
		if status, answer, _ := d.request("GET", "/socket.io/?"+query, ""); status != 400 || answer != `{"code":3,"message":"Bad request"}` {
			t.Errorf("%s: got %d %s, want 400", query, status, answer)
		}
	}
	if n := d.health("connections"); n != 0 {
		t.Errorf("%d connections, want 0", n)
	}
}

// Socket.IO events

func TestEvents(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		for _, tt := range []struct{ event, arg, answer, reply string }{
			{"join-session", `{"sessionId":"test-session-123","userType":"guest"}`, "joined-session", `{"roomName":"session-test-session-123","sessionId":"test-session-123"}`},
			{"join-session", `{"sessionId":"test-session-123"}`, "joined-session", `{"roomName":"session-test-session-123","sessionId":"test-session-123"}`},
			{"join-session", `{"sessionId":5,"userType":"admin","auth":"ignored in open mode"}`, "joined-session", `{"roomName":"session-5","sessionId":5}`},
			{"join-session", `{"sessionId":"any","userType":"customer"}`, "joined-session", `{"roomName":"session-any","sessionId":"any"}`},
			{"join-session", `{"sessionId":"any","userType":"` + strings.Repeat("é", 1000) + `"}`, "joined-session", `{"roomName":"session-any","sessionId":"any"}`},
			{"join-session", `{"sessionId":"any","userType":5}`, "joined-session", `{"roomName":"session-any","sessionId":"any"}`},
			{"join-session", `{"sessionId":9007199254740991}`, "joined-session", `{"roomName":"session-9007199254740991","sessionId":9007199254740991}`},
			{"leave-session", `{"sessionId":5}`, "left-session", `{"roomName":"session-5","sessionId":5}`},
			{"leave-session", `{"sessionId":"never-joined"}`, "left-session", `{"roomName":"session-never-joined","sessionId":"never-joined"}`},
			{"join-admin", `{}`, "joined-admin", `{"room":"admin-room"}`},
			{"join-admin", `null`, "joined-admin", `{"room":"admin-room"}`},
			{"leave-admin", `null`, "left-admin", `{"room":"admin-room"}`},
			{"leave-admin", `{}`, "left-admin", `{"room":"admin-room"}`}, // left already
		} {
			answer, ack := c.call(tt.event, tt.arg)
			if want := fmt.Sprintf("[%q,%s]", tt.answer, tt.reply); answer != want {
				t.Errorf("%s: %s %s: got %s, want %s", transport, tt.event, tt.arg, answer, want)
			}
			if want := "[" + tt.reply + "]"; ack != want {
				t.Errorf("%s: %s %s: got acknowledgement %s, want %s", transport, tt.event, tt.arg, ack, want)
			}
		}
		c.emit("join-admin") // nothing at all
		c.expect(`42["joined-admin",{"room":"admin-room"}]`)
		c.emit("leave-admin")
		c.expect(`42["left-admin",{"room":"admin-room"}]`)
		c.emit("ping", `{"any":"thing"}`)
		pong := c.expect(`42["pong",`)
		at, err := time.Parse(`{"timestamp":"2006-01-02T15:04:05.000Z"}]`, pong)
		if age := time.Since(at); err != nil || age < -time.Second || age > patience {
			t.Errorf("%s: ping: got %s (%v)", transport, pong, err)
		}
		answer, ack := c.call("unknown <b>", `1`)
		const unknown = `"unknown event \"unknown \u003cb\u003e\": there are join-session, join-admin, leave-session, leave-admin, join, leave, whisper and ping"`
		if answer != `["error",{"message":`+unknown+`}]` || ack != `[{"error":`+unknown+`}]` {
			t.Errorf("%s: unknown event: got %s and %s", transport, answer, ack)
		}
	}
}

func TestSessionIDs(t *testing.T) {
	t.Parallel()
	d := start(t)
	long := strings.Repeat("a", 128)
	c := d.dial("websocket")
	for sent, want := range map[string]string{
		`"a"`: "a", `"A-Z_a=z@0,9.;"`: "A-Z_a=z@0,9.;", `"` + long + `"`: long, `5`: "5", `"6"`: "6", `-5`: "-5", `0`: "0",
		`9007199254740993`: "9007199254740993", `"\u0062"`: "b", ` 7 `: "7",
	} {
		answer, _ := c.call("join-session", `{"sessionId":`+sent+`}`)
		if want := `["joined-session",{"roomName":"session-` + want + `","sessionId":` + strings.TrimSpace(sent) + `}]`; answer != want {
			t.Errorf("%s: got %s, want %s", sent, answer, want)
		}
		if n := d.broadcast(`{"channel":"chat-session.` + want + `","event":"e"}`); n != 1 {
			t.Errorf("%s: delivered %d to session %s, want 1", sent, n, want)
		}
		c.expect(`42["e",{}]`)
	}
	for _, sent := range []string{`""`, `"a:b"`, `"a b"`, `"a/b"`, `"ä"`, `"a\n"`, `"a\u0000"`, `"` + long + `a"`, `1.5`, `5.0`, `1e3`, `1e300`,
		strings.Repeat("1", 129), `null`, `true`, `["a"]`, `{}`} {
		if answer, _ := c.call("join-session", `{"sessionId":`+sent+`}`); !strings.HasPrefix(answer, `["error",`) {
			t.Errorf("%s: got %s, want an error", sent, answer)
		}
	}
	if got := d.health("sessions"); got != 10 {
		t.Errorf("%d sessions, want 10", got)
	}
}

func TestRefusedEvents(t *testing.T) {
	t.Parallel()
	const wantID = "sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;"
	d := start(t, "SOCKETIO_SECRET="+testSecret)
	for _, transport := range transportNames {
		c, other := d.dial(transport), d.dial("websocket")
		unsigned := "auth is missing: ask Laravel's /broadcasting/auth to sign socket_id " + c.id + " for channel "
		wrong := func(channel string) string {
			return "auth does not sign socket_id " + c.id + " for channel " + channel + ": ask Laravel anew at each connect, and check that both sides have the same SOCKETIO_SECRET"
		}
		good := sign(testSecret, c.id, "chat-session.5")
		for _, tt := range []struct{ event, args, want string }{
			{"join-session", ``, "join-session wants an object {sessionId}"},
			{"join-session", `"5"`, "join-session wants an object {sessionId}"},
			{"join-session", `null`, "join-session wants an object {sessionId}"},
			{"join-session", `[]`, "join-session wants an object {sessionId}"},
			{"join-session", `{}`, wantID},
			{"join-session", `{"sessionId":null}`, wantID},
			{"join-session", `{"sessionId":"a:b"}`, wantID},
			{"join-session", `{"sessionId":{}}`, wantID},
			{"join-session", `{"sessionId":1.5}`, wantID},
			{"join-session", `{"sessionId":"5"}`, unsigned + "chat-session.5"},
			{"join-session", `{"sessionId":"5","auth":1}`, unsigned + "chat-session.5"},
			{"join-session", `{"sessionId":"5","auth":""}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + strings.ToUpper(good) + `"}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + good + `,"}`, wrong("chat-session.5")}, // two are for what goes through Redis
			{"join-session", `{"sessionId":"6","auth":"` + good + `"}`, wrong("chat-session.6")},
			{"join-session", `{"sessionId":"5","auth":"` + sign(testSecret, other.id, "chat-session.5") + `"}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + sign(testSecret, c.sid, "chat-session.5") + `"}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + sign("another-secret-0123456789abcdef0123", c.id, "chat-session.5") + `"}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + sign(testSecret, c.id, "admin-chat") + `"}`, wrong("chat-session.5")},
			{"join-session", `{"sessionId":"5","auth":"` + sign(testSecret, c.id, "private-chat-session.5") + `"}`, wrong("chat-session.5")},
			{"join-admin", ``, unsigned + "admin-chat"},
			{"join-admin", `"x"`, "join-admin takes nothing, or an object {auth}"},
			{"join-admin", `{"auth":"` + good + `"}`, wrong("admin-chat")},
			{"leave-session", ``, "leave-session wants an object {sessionId}"},
			{"leave-session", `{"sessionId":"a:b"}`, wantID},
		} {
			args := []string{tt.args}
			if tt.args == "" {
				args = nil
			}
			message, _ := json.Marshal(tt.want)
			answer, ack := c.call(tt.event, args...)
			if want := `["error",{"message":` + string(message) + `}]`; answer != want {
				t.Errorf("%s: %s %s:\ngot  %s\nwant %s", transport, tt.event, tt.args, answer, want)
			}
			if want := `[{"error":` + string(message) + `}]`; ack != want {
				t.Errorf("%s: %s %s:\ngot  %s\nwant %s", transport, tt.event, tt.args, ack, want)
			}
		}
		if got := d.broadcast(`{"channels":["chat-session.5","chat-session.6"],"event":"e"}`); got != 0 {
			t.Errorf("%s: %d joined by refused joins", transport, got)
		}
		c.join("7") // the connection is as good as before
		c.expectNothing("7")
	}
	d.logs.wait(t, `level=WARN msg="join refused: its signature is wrong or missing, most often since the secrets of Laravel and this daemon differ" addr=127.0.0.1`)
	l := regexp.MustCompile(`(?m)^.*msg="join refused: .*\n`).ReplaceAllString(d.logs.String(), "")
	if strings.Contains(l, "level=WARN") || strings.Contains(l, "level=ERROR") {
		t.Errorf("refused events are logged above debug:\n%s", l)
	}
}

// TestNamespaces: there is one. A client may leave it and come back on the same connection.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	d := start(t, "PING_INTERVAL=300ms", "PING_TIMEOUT=1m")
	for _, transport := range transportNames {
		c := d.dial(transport)
		for _, packet := range []string{"40/random", "40/random,", `40/random,{"token":"x"}`, "40/random,{}"} {
			c.send(packet)
			if got, want := c.expect("44"), `/random,{"message":"Invalid namespace"}`; got != want {
				t.Errorf("%s: %s: got %s, want %s", transport, packet, got, want)
			}
		}
		c.join("5")
		for i := range 25 { // within messageBurst
			last := c.id
			c.sendAll("41", "40")
			var ack struct{ Sid string }
			if err := json.Unmarshal([]byte(c.expect("40")), &ack); err != nil || ack.Sid == "" || ack.Sid == last {
				t.Fatalf("%s: %d: connected anew: got %+v (%v), was %s", transport, i, ack, err, last)
			}
			c.id = ack.Sid
			if got := d.broadcast(`{"channel":"chat-session.5","event":"m"}`); got != 0 {
				t.Errorf("%s: delivered %d to who has left", transport, got)
			}
			c.join("5")
			c.expectNothing("5")
		}
		c.send("41")
		if got, err := c.nextPacket(); got != "2" || err != nil { // the connection stays
			t.Errorf("%s: after DISCONNECT: got %s, %v, want a PING", transport, got, err)
		}
		c.send("3")
		c.send(`42["ping"]`) // belongs to no namespace
		c.gone()
		d.waitHealth("connections", 0)
		for _, packet := range []string{`42/random,["ping"]`, "41/random", `431[]`, `42["ping"]`} {
			c := d.handshake(transport)
			c.send(packet)
			c.gone()
		}
		c = d.handshake(transport) // several CONNECTs at once: whatever becomes of it, all is gone in the end
		c.sendAll(slices.Repeat([]string{"40"}, 50)...)
		c.end()
		d.waitHealth("connections", 0)
	}
	d.waitHealth("sessions", 0)
}

// TestTwoConnects: who connects twice to the namespace is closed, even if both come at once, and leaves nothing behind.
func TestTwoConnects(t *testing.T) {
	d := start(t)
	each(100, func(int) {
		c := d.handshake("websocket")
		c.conn.Write(slices.Concat(masked(0x81, "40"), masked(0x81, "40")))
		c.gone()
	})
	d.waitHealth("connections", 0)
}

// TestNewID: the library makes ids, and keeps nothing.
func TestNewID(t *testing.T) {
	s, before := newTestServer(t), runtime.NumGoroutine()
	ids := make(map[socket.SocketId]bool)
	for range 1000 {
		id := s.newID()
		if len(id) < 20 || len(id) > maxSocketID || ids[id] {
			t.Fatalf("got %q", id)
		}
		ids[id] = true
	}
	eventually(t, func() string {
		if n := s.library.Sockets().Sockets().Len(); n > 0 {
			return fmt.Sprintf("%d sockets are left", n)
		}
		return ""
	})
	goroutines(t, before)
}

// TestNewcomerIsWhole: the library may call any method of an Engine.IO connection, of which it is given one that has most of them
// from the library itself.
func TestNewcomerIsWhole(t *testing.T) {
	n := &newcomer{Socket: engine.MakeSocket(), request: newTestServer(t).request, id: make(chan socket.SocketId, 1)}
	connection := reflect.TypeFor[engine.Socket]()
	whole := func(name string) {
		if err := recover(); err != nil {
			t.Errorf("%s: %v\n%.2000s", name, err, debug.Stack())
		}
	}
	for i := range connection.NumMethod() {
		method := connection.Method(i)
		if method.Name == "Construct" || method.Name == "MaybeUpgrade" { // called by an Engine.IO server, and there is none
			continue
		}
		func() {
			defer whole(method.Name)
			call := reflect.ValueOf(n).MethodByName(method.Name)
			var args []reflect.Value
			for j := range call.Type().NumIn() {
				if call.Type().IsVariadic() && j == call.Type().NumIn()-1 {
					break
				}
				args = append(args, reflect.Zero(call.Type().In(j)))
			}
			call.Call(args)
		}()
	}
	defer whole("the answer")
	w := noAnswer{}
	w.Header().Set("X", "y")
	w.WriteHeader(200)
	if _, err := w.Write([]byte("x")); err != nil {
		t.Error(err)
	}
}

// TestPackets: several in one payload, and acknowledgements, in their order.
func TestPackets(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.sendAll(`420["ping"]`, `42["join-session",{"sessionId":"a"}]`, `421["join-session",{"sessionId":"b"}]`, `42["ping",1,"2",{"3":[true]}]`)
		for _, want := range []string{`42["pong",`, `430[{"timestamp"`, `42["joined-session",{"roomName":"session-a"`, `42["joined-session",{"roomName":"session-b"`, `431[{"roomName":"session-b"`, `42["pong",`} {
			c.expect(want)
		}
		c.sendAll(`431[]`, `439999999999[1]`) // acknowledges nothing
		c.emit("ping")
		c.expect(`42["pong",`)
	}
}

// TestNotDecoded: no number of a client's is decoded, of whatever size: Go's ParseFloat takes 5 ms a KiB near zero, and refuses 1e400.
func TestNotDecoded(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.handshake(transport)
		c.send(`40{"a":[1e400,2e-308],"pid":"x","offset":1e400}`)
		c.expect(`40{"sid"`)
		c.sendAll(`42["ping",1e400,{"a":1e400}]`, `431[1e400]`, `427["ping",{"sessionId":1e400,"data":[1e400]}]`)
		c.expect(`42["pong"`)
		c.expect(`42["pong"`)
		c.expect(`437[`)
		answer, _ := c.call("nothing", `1e400`)
		if !strings.HasPrefix(answer, `["error",{"message":"unknown event`) {
			t.Errorf("%s: got %s", transport, answer)
		}
		c.end()
	}
}

// TestBadPackets sends what no client sends. A connection may end for it, the others and the log don't suffer.
func TestBadPackets(t *testing.T) {
	t.Parallel()
	d, began := start(t, unhurried), time.Now()
	witness := d.dial("websocket")
	witness.join("5")
	for _, transport := range transportNames {
		for _, packet := range []string{
			`4`, `49`, `42`, `42{}`, `42[]`, `42[null]`, `42["connect"]`, `42["disconnect"]`, `42["join-session"`, `42[1e400]`, `4299999999999999999999["ping"]`,
			`42["join-session",{"sessionId":` + strings.Repeat(`[`, 5000), `43["x"]`, `431[1]`, `451-["join-session",{"_placeholder":true,"num":0}]`, `459999999-["x"]`,
			`45-["x"]`, `44{"message":"x"}`, `40/other,`, `42/other,["ping"]`, `0{}`, `2`, `2probe`, `5`, "42[\"\xff\xfe\"]", `bAAAA`,
		} {
			c := d.dial(transport)
			if c.conn != nil {
				c.write(0x81, packet)
			} else {
				c.post(packet)
			}
		}
	}
	witness.expectNothing("5")
	l := d.logs.String()
	warning := regexp.MustCompile(`(?m)^\S+ level=WARN msg="client ended: it sent what is not supported" .*\n`)
	if n, most := len(warning.FindAllString(l, -1)), int(time.Since(began)/time.Second)+1; n == 0 || n > most {
		t.Errorf("%d warnings, want 1 to %d", n, most)
	}
	if rest := warning.ReplaceAllString(l, ""); strings.Count(rest, "\n") > 2 || strings.Contains(rest, "\x1b") {
		t.Errorf("the log has more than the start and that:\n%.3000s", rest)
	}
}

// TestInvalidPackets: they end the session. By polling, an invalid one of Engine.IO is answered 400.
func TestInvalidPackets(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, tt := range []struct {
		packet string
		status int // of the POST
	}{
		{"abc", 400}, {"7", 400}, {"", 400}, {"\x1e", 400}, {"42[\"ping\"]\x1eabc", 400},
		{"4abc", 200}, {"4", 200}, {"42{}", 200}, {"42", 200}, {"42[]", 200}, {`42["connect"]`, 200}, {`42abc["ping"]`, 200},
		{"43{}", 200}, {"40[]", 200}, {"40", 200}, {"46", 200}, {`44{"message":"x"}`, 200}, {`42/x,["ping"]`, 200}, {"1", 200}, {"42[null]", 200}, {`42[{"ping":1}]`, 200}, {`42` + strings.Repeat("1", maxNumber+1) + `["ping"]`, 200}, {"40/" + strings.Repeat("x", maxNamespace) + ",", 200},
		{`450-["ping"]`, 200}, {`451-["ping",{"_placeholder":true,"num":0}]`, 200}, {`461-1[{"_placeholder":true,"num":0}]`, 200}, {"bAQID", 200}, {"b!", 200}, // binary
	} {
		c := d.dial("polling")
		if status, answer := c.post(tt.packet); status != tt.status {
			t.Errorf("polling: %q: got %d %s, want %d", tt.packet, status, answer, tt.status)
		}
		c.expectEnd()
		d.waitHealth("connections", 0)
		if status, answer := c.post("3"); status != 400 || answer != `{"code":1,"message":"Session ID unknown"}` {
			t.Errorf("polling: after %q: got %d %s", tt.packet, status, answer)
		}
		for _, transport := range []string{"websocket", "upgraded"} {
			c := d.dial(transport)
			for packet := range strings.SplitSeq(tt.packet, "\x1e") {
				c.write(0x81, packet)
			}
			c.gone()
			d.waitHealth("connections", 0)
		}
	}
}

// TestUnsupportedIsTold: who sends what ends its session would come back and do it again. So it is told what is not supported.
func TestUnsupportedIsTold(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		for packet, want := range map[string]string{
			`451-["x",{"_placeholder":true,"num":0}]`: "binary data, or an unknown packet of Socket.IO's", // socket.emit('x', new Uint8Array(1))
			"\x04x":                 "binary data",
			`49`:                    "binary data, or an unknown packet of Socket.IO's",
			`42{}`:                  "an event that is no list with a name in front, or a reserved name",
			`42["disconnect"]`:      "an event that is no list with a name in front, or a reserved name",
			`40`:                    "a packet before CONNECT, a second CONNECT, or another namespace",
			`42/x,["ping"]`:         "a packet before CONNECT, a second CONNECT, or another namespace",
			`4`:                     "an empty message",
			`2`:                     "a PING of the client's: since protocol 4 the server sends them",
			`4212345678901234567[]`: "a long name of a namespace, or number of an acknowledgement",
		} {
			c := d.dial(transport)
			c.sendAll(packet)
			message, _ := json.Marshal("not supported: " + want)
			if got := c.expect(`42["error",`); got != `{"message":`+string(message)+`}]` {
				t.Errorf("%s: %q: got %s, want %s", transport, packet, got, message)
			}
			c.gone()
		}
	}
	c := d.dial("websocket") // by polling the POST is answered 400
	c.send("x")
	if got := c.expect(`42["error",`); got != `{"message":"not supported: no packet of Engine.IO's"}]` {
		t.Errorf("got %s", got)
	}
	c.gone()
	d.waitHealth("connections", 0)
	d.logs.wait(t, `level=WARN msg="client ended: it sent what is not supported" addr=127.0.0.1 what="`)
}

// Channels by name

// TestChannels: who gets what is posted to a channel, by the contract's table, and nobody else gets it.
func TestChannels(t *testing.T) {
	t.Parallel()
	d := start(t)
	long := strings.Repeat("a", 164)
	for _, transport := range transportNames {
		clients := make(map[string]*client)
		for _, channel := range []string{"private-x", "x", "private-orders.5", "session-5", "admin-room", "private-session-5", "private-chat-session.5", "private-admin-chat", long} {
			clients[channel] = d.dial(transport)
			clients[channel].joinChannel(channel)
		}
		both := d.dial(transport) // in several, and in the chat's rooms too
		both.joinChannel("private-x")
		both.joinChannel("x")
		both.joinChannel("private-chat-session.5")
		both.join("5")
		both.joinAdmin()
		clients["both"] = both
		clients["room"] = d.dial(transport)
		clients["room"].join("5")
		named := func(channel string) string {
			return `42["broadcast",{"channel":"` + channel + `","event":"e","data":{"a": 1}}]`
		}
		const chat = `42["e",{"a": 1}]`
		for _, tt := range []struct {
			fields string
			want   map[string][]string // packets by client
		}{
			{`"channel":"private-x"`, map[string][]string{"private-x": {named("private-x")}, "both": {named("private-x")}}},
			{`"channel":"x"`, map[string][]string{"x": {named("x")}, "both": {named("x")}}},
			{`"channel":"private-orders.5"`, map[string][]string{"private-orders.5": {named("private-orders.5")}}},
			{`"channel":"orders.5"`, nil},
			{`"channel":"presence-x"`, nil},
			{`"channel":"session-5"`, map[string][]string{"session-5": {named("session-5")}}},
			{`"channel":"private-session-5"`, map[string][]string{"private-session-5": {named("private-session-5")}}},
			{`"channel":"admin-room"`, map[string][]string{"admin-room": {named("admin-room")}}},
			{`"channel":"` + long + `"`, map[string][]string{long: {named(long)}}},
			{`"channels":["x","private-x","x"]`, map[string][]string{"private-x": {named("private-x")}, "x": {named("x")}, "both": {named("x"), named("private-x")}}},
			{`"channels":["x","private-x"],"socket":"` + both.id + `"`, map[string][]string{"private-x": {named("private-x")}, "x": {named("x")}}},
			{`"channel":"chat-session.5"`, map[string][]string{"private-chat-session.5": {named("private-chat-session.5")}, "room": {chat}, "both": {chat, named("private-chat-session.5")}}},
			{`"channel":"private-chat-session.5"`, map[string][]string{"private-chat-session.5": {named("private-chat-session.5")}, "room": {chat}, "both": {chat, named("private-chat-session.5")}}},
			{`"channel":"presence-chat-session.5","socket":"` + both.id + `"`, map[string][]string{"private-chat-session.5": {named("private-chat-session.5")}, "room": {chat}}},
			{`"channel":"admin-chat"`, map[string][]string{"private-admin-chat": {named("private-admin-chat")}, "both": {chat}}},
			{`"channels":["chat-session.5","private-x"]`, map[string][]string{"private-chat-session.5": {named("private-chat-session.5")}, "private-x": {named("private-x")},
				"room": {chat}, "both": {chat, named("private-chat-session.5"), named("private-x")}}},
		} {
			copies := 0
			for _, packets := range tt.want {
				copies += len(packets)
			}
			if n := d.broadcast(`{` + tt.fields + `,"event":"e","data":{"a": 1}}`); n != copies {
				t.Errorf("%s: %s: delivered %d, want %d", transport, tt.fields, n, copies)
			}
			for name, c := range clients {
				var got []string // in any order
				for range tt.want[name] {
					got = append(got, "42"+c.expect("42"))
				}
				slices.Sort(got)
				if want := slices.Sorted(slices.Values(tt.want[name])); !slices.Equal(got, want) {
					t.Errorf("%s: %s: %s: got %q, want %q", transport, tt.fields, name, got, want)
				}
			}
		}
		for channel, c := range clients { // nothing else has come, and after leave nothing does
			if channel == "both" || channel == "room" {
				continue
			}
			answer, ack := c.call("leave", `{"channel":"`+channel+`"}`)
			if want := `{"channel":"` + channel + `"}`; answer != `["left",`+want+`]` || ack != "["+want+"]" {
				t.Errorf("%s: leave %s: got %s and %s", transport, channel, answer, ack)
			}
			d.broadcast(`{"channel":"` + channel + `","event":"late"}`)
			c.emit("ping")
			c.expect(`42["pong"`)
		}
		if n := d.health("sessions"); n != 1 { // channels are none
			t.Errorf("%s: %d sessions, want 1", transport, n)
		}
		for _, c := range clients {
			c.end()
		}
		d.waitHealth("connections", 0)
	}
}

// TestRefusedChannels: in secured mode each join by name wants the signature of that name.
func TestRefusedChannels(t *testing.T) {
	t.Parallel()
	d := start(t, "SOCKETIO_SECRET="+testSecret)
	const wantName = "a channel's name has 1 to 164 characters of A-Z a-z 0-9 _ - = @ , . ;"
	const wantMember = `whisper is for members of a private channel: join %q first`
	for _, transport := range transportNames {
		c, other := d.dial(transport), d.dial("websocket")
		unsigned := "auth is missing: ask Laravel's /broadcasting/auth to sign socket_id " + c.id + " for channel "
		wrong := func(channel string) string {
			return "auth does not sign socket_id " + c.id + " for channel " + channel + ": ask Laravel anew at each connect, and check that both sides have the same SOCKETIO_SECRET"
		}
		signed := func(channel, name string) string {
			return fmt.Sprintf(`{"channel":%q,"auth":%q}`, channel, sign(testSecret, c.id, name))
		}
		for _, tt := range []struct{ event, arg, want string }{
			{"join", ``, wantName},
			{"join", `{}`, wantName},
			{"join", `{"channel":5}`, wantName},
			{"join", `{"channel":""}`, wantName},
			{"join", `{"channel":"a:b"}`, wantName},
			{"join", `{"channel":"` + strings.Repeat("a", 165) + `"}`, wantName},
			{"join", `{"channel":"private-x"}`, unsigned + "private-x"},
			{"join", `{"channel":"x"}`, unsigned + "x"},
			{"join", `{"channel":"x","auth":5}`, unsigned + "x"},
			{"join", signed("private-x", "x"), wrong("private-x")},
			{"join", signed("x", "private-x"), wrong("x")},
			{"join", fmt.Sprintf(`{"channel":"x","auth":%q}`, sign(testSecret, other.id, "x")), wrong("x")},
			{"join", signed("presence-x", "presence-x"), "presence channels are not supported: nobody learns who is present; take a private channel"},
			{"join", signed("chat-session.5", "chat-session.5"), "join chat-session.5 by the name private-chat-session.5, or send join-session or join-admin"},
			{"join", signed("presence-chat-session.5", "chat-session.5"), "join presence-chat-session.5 by the name private-chat-session.5, or send join-session or join-admin"},
			{"join", signed("admin-chat", "admin-chat"), "join admin-chat by the name private-admin-chat, or send join-session or join-admin"},
			{"join", signed("private-chat-session.5", "private-chat-session.5"), wrong("chat-session.5")},
			{"join", signed("private-chat-session.", "chat-session."), "sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;"},
			{"leave", `{}`, wantName},
			{"whisper", ``, fmt.Sprintf(wantMember, "")},
			{"whisper", `{"channel":"private-y","event":"typing"}`, fmt.Sprintf(wantMember, "private-y")},
			{"whisper", `{"channel":"public","event":"typing"}`, fmt.Sprintf(wantMember, "public")},
			{"whisper", `{"channel":"private-mine"}`, "whisper wants an event, such as typing"},
			{"whisper", `{"channel":"private-mine","event":5}`, "whisper wants an event, such as typing"},
			{"whisper", `{"channel":"private-mine","event":"` + strings.Repeat("x", 194) + `"}`, "event has to be a string of 1 to 200 characters"},
		} {
			if strings.HasPrefix(tt.want, "whisper") || strings.HasPrefix(tt.want, "event") {
				c.joinChannel("private-mine")
				c.joinChannel("public")
			}
			var args []string
			if tt.arg != "" {
				args = []string{tt.arg}
			}
			message, _ := json.Marshal(tt.want)
			answer, ack := c.call(tt.event, args...)
			if answer != `["error",{"message":`+string(message)+`}]` || ack != `[{"error":`+string(message)+`}]` {
				t.Errorf("%s: %s %s:\ngot  %s\nand  %s\nwant %s", transport, tt.event, tt.arg, answer, ack, message)
			}
		}
		if n := d.broadcast(`{"channels":["private-x","x","presence-x","chat-session.5","admin-chat","private-y"],"event":"e"}`); n != 0 {
			t.Errorf("%s: %d joined by refused joins", transport, n)
		}
		c.end()
	}
}

// TestManyCopies: who reads gets as many copies at once as a broadcast may have, though they are more than maxBacklog.
func TestManyCopies(t *testing.T) {
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		names := ""
		for i := range 8 {
			c.joinChannel(fmt.Sprint("c", i))
			names += fmt.Sprintf(`,"c%d"`, i)
		}
		if n := d.broadcast(`{"channels":[` + names[1:] + `],"event":"e","data":"` + strings.Repeat("x", maxBody-200) + `"}`); n != 8 {
			t.Errorf("%s: delivered %d, want 8", transport, n)
		}
		got := make(map[string]bool) // in any order
		for range 8 {
			got[c.expect(`42["broadcast",{"channel":"`)[:len(`c0","event":"e","data":"xxx`)]] = true
		}
		for i := range 8 {
			if want := fmt.Sprintf(`c%d","event":"e","data":"xxx`, i); !got[want] {
				t.Errorf("%s: %s is missing", transport, want)
			}
		}
		c.end()
	}
}

// TestWhispers: they reach the other members, as they came, and nobody else.
func TestWhispers(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		speaker, listener, stranger := d.dial(transport), d.dial(transport), d.dial(transport)
		speaker.joinChannel("private-x")
		listener.joinChannel("private-x")
		stranger.joinChannel("private-y")
		broadcasts := d.health("broadcasts")
		for _, tt := range []struct{ sent, want string }{
			{`{"channel":"private-x","event":"typing","data":{"n": 1.50,"t":"<\u2028>"}}`, `{"channel":"private-x","event":"client-typing","data":{"n": 1.50,"t":"<` + `\u2028` + `>"}}`},
			{`{"channel":"private-x","event":"typing"}`, `{"channel":"private-x","event":"client-typing","data":{}}`},
			{`{"channel":"private-x","event":"é\"","data":1e400}`, `{"channel":"private-x","event":"client-é\"","data":1e400}`},
			{`{"channel":"private-x","event":"` + strings.Repeat("x", 193) + `","data":null}`, `{"channel":"private-x","event":"client-` + strings.Repeat("x", 193) + `","data":null}`},
		} {
			speaker.send(`427["whisper",` + tt.sent + `]`)
			if got := speaker.expect("437"); got != "[{}]" {
				t.Errorf("%s: acknowledgement: got %s", transport, got)
			}
			listener.expect(`42["broadcast",` + tt.want + `]`)
		}
		speaker.emit("whisper", `{"channel":"private-x","event":"silent"}`) // answered with nothing
		speaker.emit("ping")
		speaker.expect(`42["pong"`)
		listener.expect(`42["broadcast",{"channel":"private-x","event":"client-silent","data":{}}]`)
		stranger.emit("ping")
		stranger.expect(`42["pong"`)
		if n := d.health("broadcasts"); n != broadcasts {
			t.Errorf("%s: whispers count as broadcasts", transport)
		}
		for _, c := range []*client{speaker, listener, stranger} {
			c.end()
		}
		d.waitHealth("connections", 0)
	}
}

// TestWhispersAreOwedToNobody: members who do not read are flooded with whispers, and get every broadcast.
func TestWhispersAreOwedToNobody(t *testing.T) {
	d := start(t, unhurried)
	poller, reader := d.dial("polling"), d.dial("websocket")
	for _, c := range []*client{poller, reader} {
		c.joinChannel("private-x")
	}
	speakers := make([]*client, 14)
	whisper := `42["whisper",{"channel":"private-x","event":"e","data":"` + strings.Repeat("x", 15_000) + `"}]`
	for i := range speakers {
		speakers[i] = d.dial("websocket")
		speakers[i].joinChannel("private-x")
	}
	for round := range 5 {
		for _, c := range speakers {
			c.send(whisper)
		}
		for _, c := range speakers { // they have been sent, or left out
			c.emit("ping")
			if err := c.skip(`42["pong"`); err != nil {
				t.Fatal(err)
			}
		}
		if n := d.broadcast(fmt.Sprintf(`{"channel":"private-x","event":"n","data":[%d,"%s"]}`, round, strings.Repeat("x", 50_000))); n != 2+len(speakers) {
			t.Errorf("round %d: delivered %d, want %d", round, n, 2+len(speakers))
		}
	}
	for _, c := range []*client{poller, reader} {
		for round := range 5 {
			if err := c.skip(fmt.Sprintf(`42["broadcast",{"channel":"private-x","event":"n","data":[%d,`, round)); err != nil {
				t.Fatal(err)
			}
		}
		c.emit("ping")
		if err := c.skip(`42["pong"`); err != nil {
			t.Fatal(err)
		}
	}
	if n := d.health("dropped"); n != 0 || d.health("connections") != 2+len(speakers) {
		t.Errorf("dropped %d; %d connections", n, d.health("connections"))
	}
}

// skip reads up to a packet that begins with prefix, over whispers.
func (c *client) skip(prefix string) error {
	for {
		packet, err := c.next()
		switch {
		case err != nil:
			return fmt.Errorf("waiting for %s: %w", prefix, err)
		case strings.HasPrefix(packet, prefix):
			return nil
		case !strings.Contains(packet[:min(len(packet), 100)], `"event":"client-`) && packet != "6" && !strings.HasPrefix(packet, `42["broadcast",{"channel":"private-x","event":"n"`):
			return fmt.Errorf("waiting for %s: got %.100s", prefix, packet)
		}
	}
}

// TestWhispersLeaveHalf: where whispers have half of what may wait, the next one is left out, and a broadcast is not.
func TestWhispersLeaveHalf(t *testing.T) {
	s, d := serve(t, unhurried)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go s.sendWhispers(ctx)
	speaker, listener := d.dial("websocket"), d.dial("polling")
	speaker.joinChannel("private-x")
	listener.joinChannel("private-x")
	whisper := func(n int) {
		t.Helper()
		speaker.emit("whisper", fmt.Sprintf(`{"channel":"private-x","event":"e","data":[%d,"%s"]}`, n, strings.Repeat("x", 10_000)))
	}
	whisper(1)
	eventually(t, func() string {
		if caused := s.backlog.caused.Load(); caused < 10_000 {
			return fmt.Sprintf("%d bytes wait that clients have caused", caused)
		}
		return ""
	})
	s.backlog.caused.Add(maxWaiting / 2)
	whisper(2)
	eventually(t, func() string {
		if n := s.hub.deliveries.Load(); len(s.whispers) > 0 {
			return fmt.Sprintf("%d whispers wait, %d deliveries", len(s.whispers), n)
		}
		return ""
	})
	if n := d.broadcast(`{"channel":"private-x","event":"large","data":"` + strings.Repeat("x", 300_000) + `"}`); n != 2 {
		t.Errorf("delivered %d, want 2", n)
	}
	listener.expect(`42["broadcast",{"channel":"private-x","event":"client-e","data":[1,`)
	listener.expect(`42["broadcast",{"channel":"private-x","event":"large"`)
	listener.emit("ping")
	listener.expect(`42["pong"`)
}

// TestWhispersDelayNoBroadcast: what writeLarge has still to write of whispers, no broadcast waits for; nor a whisper of broadcasts.
func TestWhispersDelayNoBroadcast(t *testing.T) {
	s := newTestServer(t)
	for i := range largeRoom + 1 {
		c := &session{server: s, wire: &wire{}, claimed: true}
		if !s.hub.enter(c, socket.SocketId(fmt.Sprint(i))) || s.hub.join(c, ":private-x") != nil {
			t.Fatal("not joined")
		}
	}
	s.hub.isWriting = true
	m := message{Channels: []string{"private-x"}, Event: "client-e", data: []byte(`"` + strings.Repeat("x", maxUnwritten) + `"`)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for step, isWhisper := range []bool{true, true, false, true} { // each is as much as may be unwritten
			m.Whisper = isWhisper
			if _, delivered, err := s.hub.fanOut(m); err != nil || delivered == 0 && step != 1 && step != 3 {
				t.Errorf("step %d: delivered %d, %v", step, delivered, err)
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("it waits")
	}
}

// TestFullWhispers: what can't be sent as fast as it comes is lost, and nobody waits.
func TestFullWhispers(t *testing.T) {
	s, d := serve(t) // which sends none
	speaker, listener := d.dial("websocket"), d.dial("websocket")
	speaker.joinChannel("private-x")
	listener.joinChannel("private-x")
	for len(s.whispers) < maxWhispers {
		s.whispers <- message{}
	}
	speaker.send(`427["whisper",{"channel":"private-x","event":"lost"}]`)
	speaker.expect(`437[{}]`)
	listener.emit("ping")
	listener.expect(`42["pong"`)
	if len(s.whispers) != maxWhispers {
		t.Errorf("%d whispers wait, want %d", len(s.whispers), maxWhispers)
	}
}

// Limits, in the order of the README's table

func TestMaxConnections(t *testing.T) {
	t.Parallel()
	d := start(t, "MAX_CONNECTIONS=3")
	clients := []*client{d.dial("websocket"), d.dial("polling"), d.dial("upgraded")}
	for _, c := range clients {
		c.join("5") // or a newcomer displaces it after joinTimeout
	}
	for range 2 {
		if status, _, header := d.request("GET", "/socket.io/?EIO=4&transport=polling", ""); status != 503 || header.Get("Retry-After") != "1" {
			t.Errorf("polling: got %d, want 503", status)
		}
		if status := (&client{t: t, d: d}).tryWebSocket(""); status != 503 {
			t.Errorf("WebSocket: got %d, want 503", status)
		}
	}
	d.logs.wait(t, `level=WARN msg="connection refused: MAX_CONNECTIONS are open" max_connections=3`)
	d.request("GET", "/socket.io/?EIO=3&transport=polling", "") // a refused handshake takes no place
	for i, c := range clients {                                 // each one gives its place back
		if c.conn != nil {
			c.conn.Close()
		} else {
			c.post("1")
		}
		d.waitHealth("connections", 2)
		clients[i] = d.dial("polling")
		t.Cleanup(clients[i].end) // or the daemon's stop waits for it
	}
}

// TestFullOfStrangers: when MAX_CONNECTIONS are open, who is in no room for longer than a page takes to join goes first.
func TestFullOfStrangers(t *testing.T) {
	t.Parallel()
	d := start(t, "MAX_CONNECTIONS=3", unhurried)
	newcomer := func() *client { // as soon as there is a place
		var c *client
		eventually(t, func() string {
			c = &client{t: t, d: d}
			if status := c.tryWebSocket(""); status != 101 {
				return fmt.Sprintf("a newcomer gets %d", status)
			}
			return ""
		})
		c.expect(`0{`)
		c.connect()
		return c
	}
	member, began := d.dial("websocket"), time.Now()
	member.join("5")
	old, young := d.dial("polling"), d.dial("websocket")
	late := newcomer()
	if took := time.Since(began); took < joinTimeout {
		t.Errorf("displaced after %v, want %v", took, joinTimeout)
	}
	if status, _, err := old.poll(); status != 400 || err != nil {
		t.Errorf("who is in no room: got %d, %v, want 400", status, err)
	}
	late.join("6")
	young.join("7")
	refused := d.health("refused_handshakes")
	for began := time.Now(); time.Since(began) < joinTimeout*5/4; {
		if status := (&client{t: t, d: d}).tryWebSocket(""); status != 503 {
			t.Fatalf("while all are in rooms: got %d, want 503", status)
		}
	}
	if n := d.health("refused_handshakes"); n <= refused {
		t.Errorf("%d refused handshakes, were %d", n, refused)
	}
	began = time.Now()
	member.emit("leave-session", `{"sessionId":"5"}`)
	member.expect(`42["left-session"`)
	newest := newcomer()
	if took := time.Since(began); took < joinTimeout {
		t.Errorf("who has left displaced after %v, want %v", took, joinTimeout)
	}
	member.expectEnd()
	newest.join("8")
	late.send("41") // it has left the namespace, and so all rooms
	newcomer().join("9")
	late.expectEnd()
	for _, c := range []*client{young, newest} {
		c.emit("ping")
		c.expect(`42["pong"`)
	}
}

func TestRoomLimit(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("websocket")
	for i := range maxRooms {
		c.join(fmt.Sprint("s", i))
	}
	answer, _ := c.call("join-session", `{"sessionId":"one-more"}`)
	if want := `["error",{"message":"a connection may be in at most 100 sessions and channels: leave one first"}]`; answer != want {
		t.Errorf("session 101: got %s, want %s", answer, want)
	}
	if got := d.health("sessions"); got != maxRooms {
		t.Errorf("/health: got %d sessions, want %d", got, maxRooms)
	}
}

// TestChannelLimit: sessions and channels count together, the admins' room does not.
func TestChannelLimit(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("websocket")
	c.joinAdmin()
	for i := range maxRooms / 2 {
		c.join(fmt.Sprint("s", i))
		c.joinChannel(fmt.Sprint("c", i))
	}
	const want = `["error",{"message":"a connection may be in at most 100 sessions and channels: leave one first"}]`
	if answer, _ := c.call("join", `{"channel":"one-more"}`); answer != want {
		t.Errorf("got %s, want %s", answer, want)
	}
}

// TestMessageLimit: 16 KiB, however they come, but several of them in one POST.
func TestMessageLimit(t *testing.T) {
	t.Parallel()
	d := start(t)
	message := func(size int) string { return `42["ping","` + strings.Repeat("x", size-len(`42["ping",""]`)) + `"]` }
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.send(message(maxMessage))
		c.expect(`42["pong"`)
		if c.conn == nil {
			if status, answer := c.post(message(maxMessage + 1)); status != 413 || answer != "a message is over 16384 bytes\n" {
				t.Errorf("%s: got %d %s, want 413", transport, status, answer)
			}
		} else {
			c.write(0x81, message(maxMessage+1))
		}
		c.gone()
	}
	c := d.dial("websocket") // in fragments
	c.conn.Write(masked(0x01, message(maxMessage)))
	c.conn.Write(masked(0x80, "x"))
	c.expectEnd()
	for _, tt := range []struct{ size, status int }{{maxMessage, 200}, {maxMessage + 1, 413}, {maxPost + 1, 413}, {50 << 20, 413}} { // without a length
		c := d.dial("polling")
		req, err := http.NewRequest("POST", c.url(), io.MultiReader(strings.NewReader(`42["ping","`), io.LimitReader(zeros{}, int64(tt.size-13)), strings.NewReader(`"]`)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			if tt.status == 413 { // it has hung up on the rest
				c.expectEnd()
				continue
			}
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tt.status || len(req.TransferEncoding) > 0 {
			t.Errorf("%d bytes in chunks: got %d, want %d", tt.size, resp.StatusCode, tt.status)
		}
		if tt.status == 200 {
			c.expect(`42["pong"`)
		} else {
			c.expectEnd()
		}
	}
}

// zeros is an endless text of the digit.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = '0'
	}
	return len(b), nil
}

// TestLargePost: clients before 4.5 know no maxPayload, and post all that they have at once.
func TestLargePost(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("polling")
	var joins []string
	for i := range maxRooms {
		joins = append(joins, fmt.Sprintf(`42["join-session",{"sessionId":"%0128d","auth":"%064d"}]`, i, i))
	}
	c.sendAll(joins...)
	for range joins {
		c.expect(`42["joined-session"`)
	}
	if status, answer := c.post(strings.Repeat("x", maxPost+1)); status != 413 || answer != "the body is over 65536 bytes\n" {
		t.Errorf("got %d %s, want 413", status, answer)
	}
	c.gone()
}

// TestHalfMessage: a WebSocket message that is begun has messageTimeout to end.
func TestHalfMessage(t *testing.T) {
	t.Parallel()
	d := start(t)
	c, witness := d.dial("websocket"), d.dial("websocket")
	began := time.Now()
	c.write(0x01, `42["ping`)
	c.expectEnd()
	if took := time.Since(began); took < messageTimeout/2 {
		t.Errorf("ended after %v, want %v", took, messageTimeout)
	}
	d.waitHealth("connections", 1)
	witness.emit("ping")
	witness.expect(`42["pong"`)
}

// tooMany is what a client is told past messageRate.
const tooMany = `42["error",{"message":"too many messages: at most 5 a second"}]`

// TestMessageRate: past the burst the client is told so once, and cut off.
func TestMessageRate(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.joinAdmin()
		c.sendAll(slices.Repeat([]string{`42["ping"]`}, 2*messageBurst)...)
		pongs, refusals := 0, 0
		for {
			packet, err := c.next()
			if err != nil || packet == "1" {
				break
			}
			switch {
			case strings.HasPrefix(packet, `42["pong"`):
				pongs++
			case packet == tooMany:
				refusals++
			default:
				t.Errorf("%s: got %s", transport, packet)
			}
		}
		// What the bucket has got back meanwhile comes on top; pongs that are not ready when the end comes are lost.
		if pongs > messageBurst+messageRate*int(patience/time.Second) || refusals != 1 {
			t.Errorf("%s: %d answers and %d refusals, want at most about %d, and 1", transport, pongs, refusals, messageBurst)
		}
		if c.conn != nil {
			if want := []byte{1001 >> 8, 1001 & 0xff}; !bytes.Equal(c.closing, want) {
				t.Errorf("%s: close frame: got % x, want % x", transport, c.closing, want)
			}
			c.conn.Close() // the daemon waits closeTimeout for it
		}
		d.waitHealth("connections", 0)
		d.waitHealth("admins", 0)
	}
}

// TestMessageBurst: what the README allows at once.
func TestMessageBurst(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("websocket") // the first of them is its CONNECT
	c.sendAll(slices.Repeat([]string{`42["ping"]`}, 107)...)
	for range 107 {
		c.expect(`42["pong"`)
	}
}

// TestMessageRateAllowed: a page that comes back with all its rooms, and then sends 20 a second.
func TestMessageRateAllowed(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		joins := []string{`42["join-admin"]`}
		for i := range maxRooms {
			joins = append(joins, fmt.Sprintf(`42["join-session",{"sessionId":%d}]`, i))
		}
		c.sendAll(joins...)
		for range joins {
			c.expect(`42["joined-`)
		}
		tick := time.NewTicker(time.Second / messageRate)
		defer tick.Stop()
		for range 3 * messageRate {
			<-tick.C
			c.emit("ping")
			c.expect(`42["pong"`)
		}
	}
}

// TestMessageRateOfLarge: a message counts for the work that it may be.
func TestMessageRateOfLarge(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		large := `43[` + strings.Repeat("0,", maxMessage/2-10) + `0]` // which is not answered
		for range messageBurst / (maxMessage >> 10) * 3 / 2 {
			if c.conn != nil {
				c.write(0x81, large)
			} else if _, answer := c.post(large); answer != "ok" {
				break // cut off
			}
		}
		c.expect(tooMany)
		c.gone()
		d.waitHealth("connections", 0)
	}
}

// TestFrameRate: what is not a message counts as one, or a client could keep a core busy with what costs it nothing.
func TestFrameRate(t *testing.T) {
	t.Parallel()
	d := start(t)
	for name, frame := range map[string][]byte{"pings": masked(0x89, ""), "pongs": masked(0x8a, ""), "fragments": masked(0x00, "")} {
		c := d.dial("websocket")
		if name == "fragments" {
			c.conn.Write(masked(0x01, ""))
		}
		c.conn.Write(bytes.Repeat(frame, 100*messageBurst))
		refusals := 0
		for {
			packet, err := c.next()
			if packet == tooMany {
				refusals++
			} else if err == nil || !strings.HasPrefix(err.Error(), "frame of kind 0x8a") { // but for the answers to pings
				break
			}
		}
		if refusals != 1 || !bytes.Equal(c.closing, []byte{1001 >> 8, 1001 & 0xff}) {
			t.Errorf("%s: got %d refusals, close frame % x, want 1, and the close frame", name, refusals, c.closing)
		}
		c.conn.Close()
		d.waitHealth("connections", 0)
	}
}

// TestWhisperLimits: none into a channel of more than maxWhispered, and a whisper is a message like any other.
func TestWhisperLimits(t *testing.T) {
	t.Parallel()
	d := start(t, unhurried)
	members := make([]*client, maxWhispered+1)
	for i := range members {
		members[i] = d.dial("websocket")
		if i < maxWhispered {
			members[i].joinChannel("private-x")
		}
	}
	members[0].emit("whisper", `{"channel":"private-x","event":"e"}`)
	for _, c := range members[1:maxWhispered] {
		c.expect(`42["broadcast"`)
	}
	members[maxWhispered].joinChannel("private-x")
	answer, _ := members[0].call("whisper", `{"channel":"private-x","event":"e"}`)
	if want := `["error",{"message":"whisper is for channels of at most 100 members"}]`; answer != want {
		t.Errorf("%d members: got %s, want %s", maxWhispered+1, answer, want)
	}
	members[1].emit("ping")
	members[1].expect(`42["pong"`)
	c := d.dial("websocket")
	c.joinChannel("private-y")
	c.sendAll(slices.Repeat([]string{`42["whisper",{"channel":"private-y","event":"e"}]`}, messageBurst)...)
	c.expect(tooMany)
	c.gone()
}

// TestWhisperBudget: a node has time for so many deliveries of whispers, whoever sends them. What is past that is left out.
func TestWhisperBudget(t *testing.T) {
	s := newTestServer(t)
	members := make([]*session, maxWhispered+1)
	for i := range members {
		members[i] = &session{server: s}
		id := socket.SocketId(fmt.Sprint(i))
		if !s.hub.enter(members[i], id) || s.hub.join(members[i], ":private-x") != nil {
			t.Fatal("not joined")
		}
	}
	whisper := message{Channels: []string{"private-x"}, Event: "client-e", Whisper: true, data: []byte("{}")}
	synctest.Test(t, func(t *testing.T) {
		s.hub.whisperLimit = newHub().whisperLimit
		if delivered, err := s.hub.broadcast(whisper); delivered != 0 || err != nil {
			t.Errorf("to %d members: delivered %d, %v", len(members), delivered, err)
		}
		s.hub.leaveAll(members[maxWhispered])
		count := func(whispers int) (delivered int) {
			for range whispers {
				n, _ := s.hub.broadcast(whisper)
				delivered += n
			}
			for _, c := range members { // who reads
				c.queue.release(len(c.queue.frames), &s.backlog)
			}
			return delivered
		}
		if n := count(100); n != whisperBurst {
			t.Errorf("100 whispers to 100 members at once: delivered %d, want %d", n, whisperBurst)
		}
		total := 0
		for range 1000 {
			time.Sleep(10 * time.Millisecond) // in synctest's time
			total += count(5)
		}
		if total < 9.9*whisperRate || total > 10*whisperRate {
			t.Errorf("in 10 s: delivered %d, want %d", total, 10*whisperRate)
		}
		whisper.Whisper = false
		if n := count(10); n != 10*maxWhispered {
			t.Errorf("10 broadcasts: delivered %d, want %d", n, 10*maxWhispered)
		}
	})
}

// TestThreeAtOnce: three of the largest broadcasts, posted at once, reach who begins to read only then.
func TestThreeAtOnce(t *testing.T) {
	t.Parallel()
	d := start(t)
	slow, poller := d.dial("websocket"), d.dial("polling")
	slow.join("5")
	poller.join("5")
	head := `{"channel":"chat-session.5","event":"big","data":"`
	each(3, func(i int) { // stallTimeout begins with the first
		if n := d.broadcast(head + strings.Repeat(fmt.Sprint(i), maxBody-len(head)-2) + `"}`); n != 2 {
			t.Errorf("broadcast %d: delivered %d, want 2", i, n)
		}
	})
	for _, c := range []*client{slow, poller} {
		got := make(map[string]bool) // in any order
		for range 3 {
			got[c.expect(`42["big","`)[:1]] = true
		}
		if len(got) != 3 {
			t.Errorf("got %v, want all three", got)
		}
	}
}

// TestSleepingPhone: who does nothing for 28 s, in which a PING comes, gets every message of that time, and is still there.
func TestSleepingPhone(t *testing.T) {
	t.Parallel()
	d := start(t, "PING_TIMEOUT=1m") // the machine may be asleep, too
	var phones []*client
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		phones = append(phones, c)
	}
	const messages = 112
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for i := range messages {
		<-tick.C
		if n := d.broadcast(fmt.Sprintf(`{"channel":"chat-session.5","event":"n","data":[%d,"%s"]}`, i, strings.Repeat("x", 500))); n != len(phones) {
			t.Fatalf("message %d: delivered %d, want %d", i, n, len(phones))
		}
	}
	for _, c := range phones {
		if c.conn != nil {
			c.conn.SetDeadline(time.Now().Add(patience))
		}
		pings := 0
		for i := range messages {
			packet, err := c.nextPacket()
			for ; err == nil && packet == "2"; packet, err = c.nextPacket() {
				pings++
				c.send("3")
			}
			if want := fmt.Sprintf(`42["n",[%d,`, i); err != nil || !strings.HasPrefix(packet, want) {
				t.Fatalf("got %.30q, %v, want %q", packet, err, want)
			}
		}
		c.emit("ping")
		c.expect(`42["pong"`)
		if pings != 1 {
			t.Errorf("%d PINGs, want 1", pings)
		}
	}
	if n := d.health("dropped"); n != 0 {
		t.Errorf("dropped %d", n)
	}
}

// TestLargestBroadcast: what /broadcast takes fits every queue, though the name is longer in JSON than it came.
func TestLargestBroadcast(t *testing.T) {
	t.Parallel()
	d := start(t)
	frame := `{"channel":"chat-session.5","event":"` + strings.Repeat("<", maxEvent) + `","data":""}`
	body := strings.Replace(frame, `""`, `"`+strings.Repeat("x", maxBody-len(frame))+`"`, 1)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		if n := d.broadcast(`{"channel":"chat-session.5","event":"before"}`) + d.broadcast(body); n != 2 {
			t.Errorf("%s: delivered %d, want 2", transport, n)
		}
		c.expect(`42["before",{}]`)
		if got := c.expect(`42["`); len(got) < maxBody {
			t.Errorf("%s: got %d bytes", transport, len(got))
		}
		c.end()
		d.waitHealth("connections", 0)
	}
}

// TestSlowReader: a member that does not read costs at most its backlog, and delays nobody.
func TestSlowReader(t *testing.T) {
	d := start(t)
	big := `{"channel":"chat-session.5","event":"big","data":"` + strings.Repeat("x", 100_000) + `"}`
	fast := d.dial("websocket")
	fast.join("5")
	for _, transport := range []string{"websocket", "polling"} {
		slow := d.dial(transport)
		if slow.conn != nil {
			slow.conn.(*net.TCPConn).SetReadBuffer(4096)
		}
		slow.join("5")
		dropped := d.health("dropped")
		for sent := 1; d.broadcast(big) == 2; sent++ { // until the slow one is cut off
			fast.expect(`42["big","xxx`)
			if sent > 30 { // 3 MB: 1 MiB of backlog and what the kernel's buffers hold
				t.Fatalf("%s: still connected after %d bytes", transport, sent*len(big))
			}
		}
		fast.expect(`42["big","xxx`)
		d.waitHealth("dropped", dropped+1)
		d.waitHealth("connections", 1)
		slow.expectEnd()
	}
	d.logs.wait(t, `level=WARN msg="client cut off" why="it does not read what waits for it"`)
	if memory := d.health("memory"); memory > 200<<20 {
		t.Errorf("memory: %d bytes", memory)
	}
}

// TestStalledReader: who takes nothing for stallTimeout is cut off.
func TestStalledReader(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("websocket")
	c.join("5")
	began := time.Now()
	d.fill(c, "5")
	d.logs.wait(t, `level=WARN msg="client cut off" why="it has taken nothing for too long" addr=127.0.0.1`)
	if took := time.Since(began); took < stallTimeout-time.Second {
		t.Errorf("cut off after %v, want %v", took, stallTimeout)
	}
	d.waitHealth("connections", 0)
	if dropped, delivered := d.health("dropped"), d.broadcast(`{"channel":"chat-session.5","event":"e"}`); dropped != 1 || delivered != 0 {
		t.Errorf("after the cut: dropped %d, want 1; delivered %d, want 0", dropped, delivered)
	}
}

// TestBacklog has a reader that is slow, so that sockets cut batches anywhere. It gets every frame whole and in order, up to the close.
func TestBacklog(t *testing.T) {
	d := start(t)
	c := d.dial("websocket")
	c.conn.(*net.TCPConn).SetReadBuffer(64 << 10) // with less, loopback's segments are dropped now and then
	c.join("5")
	sent, read := 0, 0
	for round := range 3 {
		for range 45 { // 1.35 MB
			body := fmt.Sprintf(`{"channel":"chat-session.5","event":"n","data":[%d,"%s"]}`, sent, strings.Repeat("x", sent%3*30_000))
			if n := d.broadcast(body); n != 1 {
				t.Fatalf("frame %d: delivered %d, want 1", sent, n)
			}
			sent++
		}
		if round == 2 {
			go d.stop()
			d.logs.wait(t, "msg=stopping")
		}
		for ; read < sent; read++ {
			c.expect(fmt.Sprintf(`42["n",[%d,"%s"]]`, read, strings.Repeat("x", read%3*30_000)))
		}
	}
	if packet, err := c.next(); err != io.EOF || len(c.closing) != 2 {
		t.Errorf("got %q, %v, want a close frame", packet, err)
	}
	c.conn.Close()
}

// TestQueue: what waits is counted, once for all where a frame is in several queues, and is not any more when it has left.
func TestQueue(t *testing.T) {
	var first, second queue
	var all backlog
	answer, broadcast := newEvent("pong", []byte("{}")), newEvent("e", []byte(strings.Repeat("1", 1000)))
	broadcast.kind = aBroadcast
	check := func(step string, ofFirst, ofSecond, ofAll, caused int) {
		t.Helper()
		if first.size != ofFirst || second.size != ofSecond || all.total.Load() != int64(ofAll) || all.caused.Load() != int64(caused) {
			t.Errorf("%s: got %d and %d, %d of all, %d caused, want %d, %d, %d, %d", step, first.size, second.size, all.total.Load(), all.caused.Load(), ofFirst, ofSecond, ofAll, caused)
		}
	}
	a, b := answer.cost(), broadcast.cost()
	for _, q := range []*queue{&first, &second} {
		q.enqueue(broadcast, &all)
	}
	first.enqueue(answer, &all)
	check("three frames", a+b, b, a+b, a)
	first.advance(len(broadcast.bytes)-1, &all)
	check("all of a frame but a byte", a+b, b, a+b, a)
	first.advance(1+len(answer.bytes)/2, &all)
	check("one frame and half of the next", a, b, a+b, a)
	second.release(1, &all)
	check("nobody has the broadcast", a, 0, a, a)
	first.advance(len(answer.bytes)-len(answer.bytes)/2, &all)
	check("all", 0, 0, 0, 0)
}

// TestMayWait: how much may wait for a client that does not take it, by how much waits for it and for all.
func TestMayWait(t *testing.T) {
	for _, tt := range []struct {
		size, waiting, cost int
		kind                frameKind
		shared, want        bool
	}{
		{0, 0, maxBody, aBroadcast, false, true},
		{2 * maxBody, 2 * maxBody, maxBody, aBroadcast, false, true}, // three of the largest at once
		{maxBacklog, maxBacklog, 200, aBroadcast, false, false},
		{0, maxWaiting - 8*maxBody, maxBody, aBroadcast, false, true},
		{0, maxWaiting - 8*maxBody, maxBody + 1, aBroadcast, false, false},
		{0, maxWaiting + maxBody, maxBody, aBroadcast, true, true},      // it waits for others already
		{60 << 10, maxWaiting - 512<<10, 1000, aBroadcast, false, true}, // 1,000 who do not read have 64 KB each
		{65 << 10, maxWaiting - 512<<10, 1000, aBroadcast, false, false},
		{minBacklog - 1000, maxWaiting, 1000, aBroadcast, false, true}, // a little always
		{minBacklog - 999, maxWaiting, 1000, aBroadcast, false, false},
		{60 << 10, maxWaiting/2 - 512<<10, 1000, anAnswer, false, true}, // what clients cause has half of all
		{65 << 10, maxWaiting/2 - 512<<10, 1000, anAnswer, false, false},
		{minBacklog/2 - 1000, maxWaiting / 2, 1000, anAnswer, false, true},
		{minBacklog/2 - 999, maxWaiting / 2, 1000, anAnswer, false, false},
		{60 << 10, maxWaiting/2 - 512<<10, 1000, aWhisper, false, true},
		{minBacklog/2 - 999, maxWaiting / 2, 1000, aWhisper, false, false},
		{maxWhisperBacklog + 1, maxWhisperBacklog + 1, 200, aWhisper, false, false},
	} {
		f := &frame{bytes: make([]byte, tt.cost-128), kind: tt.kind}
		if tt.shared {
			f.holders.Store(1)
		}
		s := &session{server: &server{}, queue: queue{size: tt.size}}
		s.server.backlog.total.Store(int64(tt.waiting))
		if tt.kind != aBroadcast {
			s.queue.caused = tt.size
			s.server.backlog.caused.Store(int64(tt.waiting))
		}
		if got := s.mayWait(f, false); got != tt.want {
			t.Errorf("%+v: got %v", tt, got)
		}
		left := maxWaiting - tt.waiting // and not an eighth of it, for who reads
		reads := func(size int) bool {
			switch tt.kind {
			case aWhisper:
				return size <= maxWhisperBacklog && size+tt.cost <= max(left-maxWaiting/2, minBacklog/2)
			case anAnswer:
				return size < maxBacklog && size+tt.cost <= max(left-maxWaiting/2, minBacklog/2)
			}
			return size < maxBacklog
		}
		s.polling = http.NewResponseController(httptest.NewRecorder()) // which takes it at once, if its answer is not yet on its way
		if got := s.mayWait(f, false); got != (tt.want || tt.size == 0 && reads(0)) {
			t.Errorf("%+v, and a poll that waits: got %v", tt, got)
		}
		s.wire = &wire{} // which takes it as soon as a writer comes to it
		if got := s.mayWait(f, false); got != reads(tt.size) {
			t.Errorf("%+v, on a WebSocket: got %v", tt, got)
		}
		s.draining = true
		if got := s.mayWait(f, false); got != tt.want {
			t.Errorf("%+v, on a WebSocket that is full: got %v", tt, got)
		}
		if got := s.mayWait(f, true); got != (tt.size <= maxBacklog+maxCopies) {
			t.Errorf("%+v, a copy: got %v", tt, got)
		}
	}
	// What Laravel has sent costs nobody the answer to a message of his own, however much others have caused.
	s := &session{server: &server{}, queue: queue{size: maxBody}}
	s.server.backlog.caused.Store(maxWaiting / 2)
	if !s.mayWait(newPacket(messagePacket, ""), false) {
		t.Error("an answer behind a broadcast may not wait")
	}
}

// TestMaxWaiting: the more waits for all, the less may wait for one. Who reads does not meet it.
func TestMaxWaiting(t *testing.T) {
	t.Cleanup(debug.FreeOSMemory) // TestSlowReader measures the process
	s, d := serve(t, unhurried)
	live := []*client{d.dial("websocket"), d.dial("polling")}
	for _, c := range live {
		c.join("live")
	}
	for i := range 2 * maxWaiting >> 20 {
		d.dial("polling").join(fmt.Sprint(i))
		d.broadcast(fmt.Sprintf(`{"channel":"chat-session.%d","event":"e","data":"%s"}`, i, strings.Repeat("x", maxBody/2-100)))
		if waiting := s.backlog.total.Load(); waiting > maxWaiting {
			t.Fatalf("%d bytes wait", waiting)
		}
		if n := d.broadcast(`{"channel":"chat-session.live","event":"large","data":"` + strings.Repeat("x", 50<<10) + `"}`); n != len(live) {
			t.Fatalf("with %d bytes waiting: delivered %d, want %d", s.backlog.total.Load(), n, len(live))
		}
		for _, c := range live {
			c.expect(`42["large","xxx`)
		}
	}
	if waiting := s.backlog.total.Load(); waiting < maxWaiting*3/4 {
		t.Errorf("only %d bytes wait", waiting)
	}
}

// TestUnreadAnswers: a client that posts and never polls is cut off when its answers have taken its share of what may wait.
func TestUnreadAnswers(t *testing.T) {
	s, d := serve(t, "SOCKETIO_SECRET="+testSecret)
	const others = maxWaiting/2 - 256<<10 // bytes that wait for others
	s.backlog.total.Add(others)
	s.backlog.caused.Add(others)
	c := d.dial("polling")
	refused := `42["join-session",{"sessionId":"` + strings.Repeat("x", 128) + `"}]`
	most := 0
	for open := true; open; {
		_, answer := c.post(strings.TrimSuffix(strings.Repeat(refused+"\x1e", 5), "\x1e"))
		open = answer == "ok"
		most = max(most, int(s.backlog.total.Load())-others)
	}
	if want := 256 << 10 / 9; most < want/2 || most > want { // 8 * share = 256 KiB - share
		t.Errorf("%d bytes waited, want about %d", most, want)
	}
	d.waitHealth("connections", 0)
	if n := s.backlog.total.Load(); n != others || s.dropped.Load() != 1 {
		t.Errorf("%d bytes wait for nobody; dropped %d, want 1", n-others, s.dropped.Load())
	}
}

// TestUnreadAnswersOfMany: who fills what may wait with answers, for which nobody signs, has nobody cut off who reads.
func TestUnreadAnswersOfMany(t *testing.T) {
	t.Cleanup(debug.FreeOSMemory) // TestSlowReader measures the process
	s, d := serve(t, unhurried)
	live := []*client{d.dial("websocket"), d.dial("polling"), d.dial("upgraded")}
	for _, c := range live {
		c.join("live")
	}
	posts := strings.TrimSuffix(strings.Repeat(`421["join",{"channel":"`+strings.Repeat("x", 140)+`"}]`+"\x1e", 88), "\x1e")
	each(1500, func(int) {
		c := d.handshake("polling")
		c.post("40\x1e" + posts) // or is cut off
	})
	if waiting := s.backlog.total.Load(); waiting < maxWaiting/4 || waiting > maxWaiting*3/4 {
		t.Errorf("%d bytes wait, want about half of %d", waiting, maxWaiting)
	}
	for i := range 28 {
		if n := d.broadcast(fmt.Sprintf(`{"channel":"chat-session.live","event":"n","data":[%d,"%s"]}`, i, strings.Repeat("x", 1500))); n != len(live) {
			t.Fatalf("broadcast %d: delivered %d, want %d", i, n, len(live))
		}
	}
	for _, c := range live {
		for i := range 28 {
			c.expect(fmt.Sprintf(`42["n",[%d,`, i))
		}
	}
}

// TestUnreadAnswersAreFreed: who polls again while it does not read the first answer has its session ended, and the answer goes
// with it. Without that, each would keep its answer in memory for answerTimeout, and be counted nowhere.
func TestUnreadAnswersAreFreed(t *testing.T) {
	d := start(t, "SOCKETIO_SECRET="+testSecret, unhurried)
	const clients = 60
	var conns []net.Conn
	before, heap := runtime.NumGoroutine(), liveHeap()
	most := `42["whisper",{"channel":"` + strings.Repeat("\U0010ffff", 164) + `"}]` // whose answer quotes each as eleven characters
	for range clients {
		c := d.dial("polling")
		for range 2 {
			c.post(strings.TrimSuffix(strings.Repeat(strings.Replace(most, "42", "421", 1)+"\x1e", 52), "\x1e"))
		}
		conns = append(conns, c.unreadPoll(), c.unreadPoll())
	}
	d.waitHealth("connections", 0)
	d.waitHealth("dropped", clients)
	goroutines(t, before)
	if grown := liveHeap() - heap; grown > clients*50<<10 { // the test's own connections and what the daemon keeps of them
		t.Errorf("%d bytes are left of %d sessions that have ended", grown, clients)
	}
	runtime.KeepAlive(conns)
}

// TestUnreadLargePolls: an answer that nobody reads is not copied for each.
func TestUnreadLargePolls(t *testing.T) {
	d := start(t)
	const polls = 100
	for range polls {
		c := d.dial("polling")
		c.join("5")
		t.Cleanup(c.end) // or the daemon's stop waits for it
		conn := d.raw(fmt.Sprintf("GET %s&sid=%s HTTP/1.1\nHost: 127.0.0.1\n\n", handshakePath, c.sid))
		conn.(*net.TCPConn).SetReadBuffer(4096)
	}
	before := liveHeap()
	if n := d.broadcast(`{"channel":"chat-session.5","event":"e","data":"` + strings.Repeat("x", maxBody-100) + `"}`); n != polls {
		t.Errorf("delivered %d, want %d", n, polls)
	}
	if grown := liveHeap() - before; grown > 10<<20 {
		t.Errorf("%d bytes for %d polls of one message", grown, polls)
	}
}

// TestUnreadPoll: while an answer is under way that the client does not read, a second poll is one too many. Its session ends
// as one of a client that does not read: counted, and logged.
func TestUnreadPoll(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("polling")
	c.join("5")
	d.fill(c, "5")
	c.unreadPoll()
	if status, answer, err := c.poll(); status != 400 || answer != errOverlap.Error()+"\n" {
		t.Errorf("a second poll: got %d %.100s, %v", status, answer, err)
	}
	d.waitHealth("connections", 0)
	d.waitHealth("dropped", 1)
	d.logs.wait(t, `level=WARN msg="client cut off" why="it does not read what waits for it" addr=127.0.0.1`)
}

// unreadPoll sends a poll whose answer nobody reads but for its first line, with little room for it in the kernel.
func (c *client) unreadPoll() net.Conn {
	c.t.Helper()
	conn := c.d.raw("")
	conn.(*net.TCPConn).SetReadBuffer(4096)
	fmt.Fprintf(conn, "GET %s&sid=%s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", handshakePath, c.sid)
	if _, err := io.ReadFull(conn, make([]byte, len("HTTP/1.1 200"))); err != nil { // it is under way
		c.t.Fatal(err)
	}
	return conn
}

// brokenWriter is an answer that does not get out.
type brokenWriter struct {
	http.ResponseWriter
	deadlines []time.Time
}

func (w *brokenWriter) SetWriteDeadline(t time.Time) error {
	w.deadlines = append(w.deadlines, t)
	return nil
}

func (w *brokenWriter) FlushError() error { return os.ErrDeadlineExceeded }

// TestBrokenPoll: an answer has answerTimeout to leave. One that did not ends the session: what was in it is lost.
func TestBrokenPoll(t *testing.T) {
	s, l := newLoggedServer(t, slog.LevelInfo)
	d := serveOn(t, s)
	c := d.dial("polling")
	c.join("5")
	d.broadcast(`{"channel":"chat-session.5","event":"lost"}`)
	w, began := &brokenWriter{ResponseWriter: httptest.NewRecorder()}, time.Now()
	s.http.Handler.ServeHTTP(w, localRequest(t.Context(), "GET", handshakePath+"&sid="+c.sid, ""))
	if len(w.deadlines) < 2 || !w.deadlines[0].IsZero() || w.deadlines[1].Before(began.Add(answerTimeout)) || w.deadlines[1].After(time.Now().Add(answerTimeout)) {
		t.Errorf("deadlines %v, want none, and then one in %v", w.deadlines, answerTimeout)
	}
	if status, answer, err := c.poll(); status != 400 || answer != `{"code":1,"message":"Session ID unknown"}` && answer != errOverlap.Error()+"\n" {
		t.Errorf("the next poll: got %d %s, %v, want 400", status, answer, err)
	}
	d.waitHealth("connections", 0)
	d.waitHealth("dropped", 1)
	l.wait(t, `level=WARN msg="client cut off" why="it has taken nothing for too long"`)
}

// TestLongLife: what limits an upgrade, and what limits a client that reads slowly, ends with them.
func TestLongLife(t *testing.T) {
	t.Parallel()
	d := start(t, "PING_INTERVAL=1s", "PING_TIMEOUT="+patience.String())
	c := d.dial("upgraded")
	c.join("5")
	d.fill(c, "5")
	filled := 0
	for pings, most := 0, int(max(upgradeTimeout, stallTimeout)/time.Second)+2; pings < most; {
		packet, err := c.nextPacket()
		switch {
		case err != nil:
			t.Fatalf("after %d pings: %v", pings, err)
		case packet == "2":
			pings++
			c.send("3")
		case strings.HasPrefix(packet, `42["fill"`):
			filled++
		}
	}
	if n := d.broadcast(`{"channel":"chat-session.5","event":"last"}`); n != 1 || filled != filling {
		t.Errorf("delivered %d, want 1; %d of %d arrived", n, filled, filling)
	}
	c.expect(`42["last",{}]`)
}

// TestPipeline: what a client sends behind a poll that waits stays with the client. Its connection has had several large
// bodies before, for which the kernel would have let its buffer grow.
func TestPipeline(t *testing.T) {
	d := start(t)
	c := d.dial("polling")
	body := strings.Repeat("x", maxBody)
	conn := d.raw("").(*net.TCPConn)
	go func() {
		for range 12 {
			fmt.Fprintf(conn, "POST /broadcast HTTP/1.1\nHost: 127.0.0.1\nContent-Length: %d\n\n%s", len(body), body)
		}
	}()
	answers := bufio.NewReader(conn)
	for range 12 {
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		if io.Copy(io.Discard, resp.Body); resp.StatusCode != 400 {
			t.Fatalf("got %d, want 400", resp.StatusCode)
		}
	}
	fmt.Fprintf(conn, "GET %s&sid=%s HTTP/1.1\nHost: 127.0.0.1\n\n", handshakePath, c.sid)
	conn.SetWriteBuffer(4096)
	taken := 0
	for n, err := 0, error(nil); err == nil && taken < 16<<20; taken += n {
		conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err = conn.Write([]byte(body))
	}
	if taken > 256<<10 {
		t.Errorf("%d bytes were taken while nobody read", taken)
	}
}

// TestSlowBody: a body that has not come after requestTimeout is answered 400, for the answer's time begins with it.
func TestSlowBody(t *testing.T) {
	t.Parallel()
	d := start(t)
	conn := d.raw("POST /broadcast HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 9\n\n{")
	if status, body, err := answer(conn); status != 400 || !strings.Contains(body, "the body did not arrive whole") || err != nil {
		t.Errorf("got %d %s, %v, want 400", status, body, err)
	}
}

// TestSlowRequests: who has not sent its request or its body after 10 s is cut off, and so is who never connects.
func TestSlowRequests(t *testing.T) {
	t.Parallel()
	d, began := start(t), time.Now()
	poller := func() string {
		return handshakePath + "&sid=" + d.dial("polling").sid + " HTTP/1.1\nHost: localhost\nContent-Length: 9\n\n"
	}
	ended := make(map[string]func() error)
	for name, request := range map[string]string{
		"silence":          "",
		"half a header":    "GET /health HTTP/1.1\nHost: localhost\nX-Slow: ",
		"half a broadcast": "POST /broadcast HTTP/1.1\nHost: localhost\nContent-Length: 9\n\n{",
		"half a payload":   "POST " + poller() + "4",
		"half a chunk":     "POST " + strings.Replace(poller(), "Content-Length: 9", "Transfer-Encoding: chunked", 1) + "9\n4",
	} {
		conn := d.raw(request)
		ended[name] = func() error {
			_, err := io.Copy(io.Discard, conn)
			return err
		}
	}
	drip := d.raw("GET /health HTTP/1.1\nHost: localhost\nX-Slow: ")
	go func() { // a byte now and then does not help
		for range time.Tick(300 * time.Millisecond) {
			if _, err := drip.Write([]byte("x")); err != nil {
				return
			}
		}
	}()
	ended["a header byte by byte"] = func() error {
		_, err := io.Copy(io.Discard, drip)
		return err
	}
	for _, transport := range []string{"websocket", "polling"} {
		idle, other := d.handshake(transport), d.handshake(transport)
		other.send("40/other,")
		other.expect("44/other,")
		for name, c := range map[string]*client{"no CONNECT by ": idle, "no namespace by ": other} {
			if c.conn != nil {
				c.conn.SetDeadline(time.Now().Add(2 * patience))
			}
			ended[name+transport] = func() error {
				for {
					if c.conn != nil { // past readFrame's patience
						_, err := io.Copy(io.Discard, c.br)
						return err
					}
					resp, err := http.Get(c.url())
					if err != nil {
						return err
					}
					answer, _ := io.ReadAll(resp.Body)
					resp.Body.Close()
					if string(answer) == "1" || resp.StatusCode != 200 {
						return nil
					}
				}
			}
		}
	}
	var all sync.WaitGroup
	for name, end := range ended {
		all.Go(func() {
			err := end()
			var timeout net.Error
			if took := time.Since(began); errors.As(err, &timeout) && timeout.Timeout() || took < 9*time.Second || took > 18*time.Second+patience/4 {
				t.Errorf("%s: ended after %v (%v), want 10 s", name, took.Round(time.Millisecond), err)
			}
		})
	}
	all.Wait()
}

// TestPollWithBody: net/http would read the body before it writes a poll's answer, which so would outlive the session.
func TestPollWithBody(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("polling")
	for _, request := range []string{"GET " + handshakePath, "GET " + handshakePath + "&sid=" + c.sid, "GET " + upgradePath} {
		conn := d.raw(request + " HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 1\n\nx")
		if status, body, err := answer(conn); status != 400 || body != badRequest {
			t.Errorf("%s: got %d %s, %v", request, status, body, err)
		}
	}
	c.emit("ping")
	c.expect(`42["pong"`)
}

// TestRequestsEnd: a connection that announces a body and sends none, or does not read its answers, is closed, on every path.
func TestRequestsEnd(t *testing.T) {
	t.Parallel()
	d := start(t, "SOCKETIO_SECRET="+testSecret, unhurried)
	bearer := "Authorization: Bearer " + testSecret + "\n"
	var all sync.WaitGroup
	for _, request := range []string{
		"OPTIONS *", "GET /health", "POST /health", "GET /", "POST /nothing", "GET /broadcast", "POST /broadcast", "POST /broadcast/", "POST /broadcast/x",
		"GET /socket.io/socket.io.js", "POST /socket.io/", "GET " + handshakePath, "POST " + handshakePath, "OPTIONS " + handshakePath,
		"GET " + handshakePath + "&sid=x", "POST " + handshakePath + "&sid=x", "GET " + handshakePath + "&sid=" + d.dial("polling").sid,
		"POST " + handshakePath + "&sid=" + d.dial("polling").sid, "PUT " + handshakePath + "&sid=" + d.dial("polling").sid, "GET " + upgradePath,
	} {
		for _, header := range []string{"Content-Length: 5\n", "Content-Length: 5\n" + bearer, "Transfer-Encoding: chunked\n", "Transfer-Encoding: chunked\n" + bearer} {
			conn := d.raw(request + " HTTP/1.1\nHost: 127.0.0.1\n" + header + "\n")
			conn.SetDeadline(time.Now().Add(3 * patience))
			began := time.Now()
			all.Go(func() {
				_, err := io.Copy(io.Discard, conn)
				if took := time.Since(began); errors.Is(err, os.ErrDeadlineExceeded) || took > requestTimeout+patience/2 {
					t.Errorf("%s, %q: ended after %v, %v, want %v", request, header, took, err, requestTimeout)
				}
			})
		}
	}
	for _, request := range []string{
		"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n", "GET / HTTP/1.1\nHost: 127.0.0.1\n\n", "POST /broadcast HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 0\n\n",
		"POST /broadcast HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 2\n" + bearer + "\n{}", "GET " + handshakePath + "&sid=x HTTP/1.1\nHost: 127.0.0.1\n\n",
		"OPTIONS " + handshakePath + " HTTP/1.1\nHost: 127.0.0.1\n\n",
	} {
		conn := d.raw("")
		conn.(*net.TCPConn).SetReadBuffer(4096)
		began := time.Now()
		all.Go(func() {
			pipelined := bytes.Repeat([]byte(strings.ReplaceAll(request, "\n", "\r\n")), 1000)
			for end := began.Add(3 * patience); time.Now().Before(end); { // whatever is taken: until the connection is reset
				conn.SetWriteDeadline(time.Now().Add(time.Second))
				n, err := conn.Write(pipelined)
				if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					if took := time.Since(began); took > answerTimeout+patience {
						t.Errorf("%q, pipelined: ended after %v, want %v", request, took, answerTimeout)
					}
					return
				}
				pipelined = append(pipelined[n:], pipelined[:n]...)
			}
			t.Errorf("%q, pipelined: the connection did not end", request)
		})
	}
	all.Wait()
}

// fullListener has each of its connections' send buffers full before the daemon has it, for a client that does not read.
type fullListener struct{ net.Listener }

func (l fullListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	for err == nil {
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		_, err = conn.Write(make([]byte, 64<<10))
	}
	return conn, conn.SetWriteDeadline(time.Time{})
}

// TestUnreadHandshake: a WebSocket handshake whose answer nobody reads ends, and gives its place back.
func TestUnreadHandshake(t *testing.T) {
	t.Parallel()
	s := newTestServer(t)
	d := serveOn(t, s)
	listener, err := listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.http.Serve(fullListener{listener})
	unread := &daemon{t: t, addr: listener.Addr().String()}
	began := time.Now()
	conn := unread.raw("GET " + upgradePath + " HTTP/1.1\nHost: 127.0.0.1\n" + strings.ReplaceAll(upgradeHeader, "\r\n", "\n") + "\n")
	d.waitHealth("connections", 1)
	d.waitHealth("connections", 0)
	if took := time.Since(began); took < requestTimeout {
		t.Errorf("ended after %v, want %v", took, requestTimeout)
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("its connection is open: %v", err)
	}
}

// TestNextRequestIsNotCut: a session that ends lets go of the connection by which its last poll came. Behind nginx, the next
// request on it is another client's.
func TestNextRequestIsNotCut(t *testing.T) {
	d := start(t)
	for range 20 {
		c := d.dial("polling")
		conn := d.raw(fmt.Sprintf("GET %s&sid=%s HTTP/1.1\nHost: 127.0.0.1\n\n", handshakePath, c.sid))
		c.emit("ping")
		answers := bufio.NewReader(conn)
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || !strings.HasPrefix(string(b), `42["pong"`) {
			t.Fatalf("the poll: got %s, %v", b, err)
		}
		const body = `{"channel":"admin-chat","event":"e"}`
		fmt.Fprintf(conn, "POST /broadcast HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", len(body))
		if line, err := answers.ReadString('\n'); err != nil || !strings.Contains(line, "100 Continue") { // it is under way
			t.Fatalf("got %q, %v", line, err)
		}
		answers.ReadString('\n')
		if status, _ := c.post("x"); status != 400 { // which ends the session
			t.Fatalf("an invalid packet: got %d, want 400", status)
		}
		d.waitHealth("connections", 0)
		io.WriteString(conn, body)
		if resp, err := http.ReadResponse(answers, nil); err != nil || resp.StatusCode != 200 {
			t.Fatalf("the next request: got %v, %v, want 200", resp, err)
		}
		conn.Close()
	}
}

// The protocol: Engine.IO's handshake, heartbeat, polls, WebSockets and upgrades

// The protocols' public suites (socketio/engine.io-protocol and socketio/socket.io-protocol, test-suite.js), in
// words of our own and with their heartbeat, and what nobody's client sends.

func TestOpenPacket(t *testing.T) {
	t.Parallel()
	d := start(t, quick...)
	for transport, upgrades := range map[string]string{"websocket": `[]`, "polling": `["websocket"]`} {
		c := d.handshake(transport)
		want := fmt.Sprintf(`{"maxPayload":16384,"pingInterval":300,"pingTimeout":200,"sid":%q,"upgrades":%s}`, c.sid, upgrades)
		if c.open != want || len(c.sid) < 16 {
			t.Errorf("%s: got %s, want %s", transport, c.open, want)
		}
	}
}

// TestOddHandshakes: none of these becomes a session, or the session's place is given back when it ends.
func TestOddHandshakes(t *testing.T) {
	t.Parallel()
	d := start(t)
	for name, request := range map[string]string{
		"WebSocket without EIO":       "GET /socket.io/?transport=websocket HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket, EIO=3":            "GET /socket.io/?EIO=3&transport=websocket HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket, EIO=abc":          "GET /socket.io/?EIO=abc&transport=websocket HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket without transport": "GET /socket.io/?EIO=4 HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket, transport=abc":    "GET /socket.io/?EIO=4&transport=abc HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"an upgrade to polling":       "GET " + handshakePath + " HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket by POST":           "POST " + upgradePath + " HTTP/1.1\nHost: localhost\nContent-Length: 0\n" + upgradeHeader + "\n",
		"WebSocket, version 12":       "GET " + upgradePath + " HTTP/1.1\nHost: localhost\n" + strings.Replace(upgradeHeader, "13", "12", 1) + "\n",
		"WebSocket without key":       "GET " + upgradePath + " HTTP/1.1\nHost: localhost\n" + strings.Replace(upgradeHeader, "AAAA", "", 1) + "\n",
		"WebSocket over HTTP/1.0":     "GET " + upgradePath + " HTTP/1.0\nHost: localhost\n" + upgradeHeader + "\n",
		"frames before the answer":    "GET " + upgradePath + " HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n\x81\x80\x00\x00\x00\x00",
		"WebSocket, empty sid":        "GET " + upgradePath + "&sid= HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"WebSocket, two sids":         "GET " + upgradePath + "&sid=&sid=x HTTP/1.1\nHost: localhost\n" + upgradeHeader + "\n",
		"polling, empty sid":          "GET " + handshakePath + "&sid= HTTP/1.1\nHost: localhost\n\n",
		"two transports":              "GET " + handshakePath + "&transport=websocket HTTP/1.1\nHost: localhost\n\n",
	} {
		conn := d.raw(strings.ReplaceAll(request, "\r\n", "\n"))
		conn.SetDeadline(time.Now().Add(patience))
		status, body, err := answer(conn)
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Errorf("%s: no answer: %v", name, err)
		}
		// A polling session has not got a client that could close it.
		if _, sid, ok := strings.Cut(body, `"sid":"`); ok {
			(&client{t: t, d: d, sid: sid[:strings.IndexByte(sid, '"')]}).post("1")
		} else if status == 200 {
			t.Errorf("%s: got %d %s", name, status, body)
		}
		conn.Close()
		d.waitHealth("connections", 0)
	}
}

// TestRefusedHandshakes: the answers of Engine.IO (protocol 4), by status and code, and our own.
func TestRefusedHandshakes(t *testing.T) {
	t.Parallel()
	d := start(t)
	upgraded := d.dial("upgraded")
	poller := d.dial("polling")
	for _, tt := range []struct {
		method, query string
		status        int
		want          string
	}{
		{"GET", "EIO=4", 400, `{"code":0,"message":"Transport unknown"}`},
		{"GET", "EIO=4&transport=carrier-pigeon", 400, `{"code":0,"message":"Transport unknown"}`},
		{"GET", "EIO=4&transport=webtransport", 400, `{"code":0,"message":"Transport unknown"}`},
		{"GET", "transport=polling", 400, `{"code":5,"message":"Unsupported protocol version"}`},
		{"GET", "EIO=3&transport=polling", 400, `{"code":5,"message":"Unsupported protocol version"}`},
		{"GET", "EIO=4&transport=websocket", 400, `{"code":3,"message":"Bad request"}`},
		{"POST", "EIO=4&transport=polling", 400, `{"code":2,"message":"Bad handshake method"}`},
		{"PUT", "EIO=4&transport=polling", 400, `{"code":2,"message":"Bad handshake method"}`},
		{"GET", "EIO=4&transport=polling&sid=unknown", 400, `{"code":1,"message":"Session ID unknown"}`},
		{"POST", "EIO=4&transport=polling&sid=unknown", 400, `{"code":1,"message":"Session ID unknown"}`},
		{"GET", "EIO=4&transport=polling&sid=" + upgraded.sid, 400, `{"code":3,"message":"Bad request"}`},
		{"POST", "EIO=4&transport=polling&sid=" + upgraded.sid, 400, `{"code":3,"message":"Bad request"}`},
		{"GET", "EIO=4&transport=websocket&sid=" + poller.sid, 400, `{"code":3,"message":"Bad request"}`},
		{"PUT", "EIO=4&transport=polling&sid=" + poller.sid, 400, `{"code":3,"message":"Bad request"}`},
		{"GET", "EIO=4&transport=polling&j=0", 400, "JSONP polling is not supported\n"},
		{"GET", "EIO=4&transport=polling&j=0&sid=" + poller.sid, 400, "JSONP polling is not supported\n"},
	} {
		status, answer, _ := d.request(tt.method, "/socket.io/?"+tt.query, "")
		if status != tt.status || answer != tt.want {
			t.Errorf("%s %s: got %d %s, want %d %s", tt.method, tt.query, status, answer, tt.status, tt.want)
		}
	}
	for _, c := range []*client{upgraded, poller} { // unharmed
		c.emit("ping")
		c.expect(`42["pong"`)
	}
	if status := (&client{t: t, d: d}).tryWebSocket("unknown"); status != 400 {
		t.Errorf("upgrade of an unknown session: got %d, want 400", status)
	}
	var open struct {
		Upgrades                              []string
		PingInterval, PingTimeout, MaxPayload int
	}
	if err := json.Unmarshal([]byte(poller.open), &open); err != nil || !slices.Equal(open.Upgrades, []string{"websocket"}) ||
		open.PingInterval != 25000 || open.PingTimeout != 20000 || open.MaxPayload != maxMessage {
		t.Errorf("OPEN: got %s (%v)", poller.open, err)
	}
}

// TestHeartbeat: three rounds keep a connection, then silence ends it after interval and time-out.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	const interval, timeout = 300 * time.Millisecond, 15 * time.Second // time for a loaded machine to answer
	d := start(t, "PING_INTERVAL="+interval.String(), "PING_TIMEOUT="+timeout.String())
	each(len(transportNames), func(i int) {
		transport := transportNames[i]
		c := d.dial(transport)
		var answered time.Time
		for i := range 3 {
			if packet, err := c.nextPacket(); packet != "2" || err != nil {
				t.Errorf("%s: round %d: got %s, %v, want a PING", transport, i, packet, err)
				return
			}
			answered = time.Now() // before the daemon can know
			c.send("3")
		}
		if packet, err := c.nextPacket(); packet != "2" || err != nil {
			t.Errorf("%s: got %s, %v, want a PING", transport, packet, err)
			return
		}
		for packet, err := "", error(nil); err == nil && packet != "1"; { // a poll keeps nobody alive
			packet, err = c.nextPacket()
			if packet == "2" {
				t.Errorf("%s: got another PING", transport)
			}
		}
		if took := time.Since(answered); took < interval+timeout-10*time.Millisecond || took > interval+timeout+patience/4 {
			t.Errorf("%s: ended %v after the last PONG, want %v", transport, took, interval+timeout)
		}
		if c.conn != nil {
			c.conn.Close()
		} else {
			if status, answer := c.post("3"); status != 400 || answer != `{"code":1,"message":"Session ID unknown"}` {
				t.Errorf("%s: PONG after the end: got %d %s", transport, status, answer)
			}
		}
	})
	d.waitHealth("connections", 0)
}

// TestQuickPong answers each PING at once: before the daemon could have begun to wait for it, were it to send first.
func TestQuickPong(t *testing.T) {
	t.Parallel()
	d := start(t, "PING_INTERVAL=600ms", "PING_TIMEOUT="+patience.String())
	each(len(transportNames), func(i int) {
		c := d.dial(transportNames[i])
		for ping := range 6 {
			if packet, err := c.nextPacket(); err != nil || packet != "2" {
				t.Errorf("%s: after %d PINGs: got %q, %v", transportNames[i], ping, packet, err)
				break
			}
			c.send("3")
		}
		c.end()
	})
}

// TestManyPongs: one PING is answered once. v3.0.6 leaves a goroutine behind for each PONG that races another.
func TestManyPongs(t *testing.T) {
	d := start(t, "PING_INTERVAL=100ms", "PING_TIMEOUT="+patience.String())
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	for range 200 {
		c := d.dial("websocket")
		all.Go(func() {
			defer c.conn.Close()
			for _, pongs := range []int{messageBurst - 10, 1} {
				if packet, err := c.nextPacket(); packet != "2" || err != nil {
					t.Errorf("got %q, %v, want a PING", packet, err)
					return
				}
				c.conn.Write(bytes.Repeat(masked(0x81, "3"), pongs))
			}
		})
	}
	all.Wait()
	d.waitHealth("connections", 0)
	goroutines(t, before)
}

// TestPongWithoutPing: a PONG counts for a PING that has left, and not for one that waits for a poll.
func TestPongWithoutPing(t *testing.T) {
	t.Parallel()
	d := start(t, "LOG_LEVEL=debug", "PING_INTERVAL=1s", "PING_TIMEOUT=4s")
	c := d.dial("polling")
	tick := time.NewTicker(time.Second / (messageRate - 1)) // or it would be cut off for flooding
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		if status, _ := c.post("3"); status == 400 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a client that never polls stays by its PONGs")
		}
	}
	d.logs.wait(t, `msg=disconnected id=`+c.id+` addr=127.0.0.1 reason="ping timeout"`)
	d.waitHealth("connections", 0)
}

// TestPingAcrossUpgrade: a PING that was sent by polling is to be answered after the upgrade all the same.
func TestPingAcrossUpgrade(t *testing.T) {
	t.Parallel()
	d := start(t, "PING_INTERVAL=300ms", "PING_TIMEOUT=15s") // time for both to upgrade on a loaded machine
	live, dead := d.dial("polling"), d.dial("polling")
	for _, c := range []*client{live, dead} {
		if packet, err := c.nextPacket(); packet != "2" || err != nil {
			t.Fatalf("got %s, %v, want a PING", packet, err)
		}
		c.upgrade()
		if c == live {
			c.send("3")
		}
	}
	for range 3 {
		if packet, err := live.nextPacket(); packet != "2" || err != nil {
			t.Fatalf("answered: got %s, %v, want a PING", packet, err)
		}
		live.send("3")
	}
	if _, err := dead.nextPacket(); err != io.EOF {
		t.Errorf("not answered: got %v, want the end", err)
	}
}

// TestVanished: peers that are gone without a word are forgotten after interval and time-out.
func TestVanished(t *testing.T) {
	d := start(t, "PING_INTERVAL=1s", "PING_TIMEOUT=1s") // time for a loaded machine to join
	before := runtime.NumGoroutine()
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		c.joinAdmin()
	}
	began := time.Now() // the connections stay open, and silent
	for _, field := range []string{"connections", "sessions", "admins"} {
		d.waitHealth(field, 0)
	}
	if took := time.Since(began); took > 2*time.Second+patience/4 {
		t.Errorf("gone after %v, want 2 s", took)
	}
	for i := range 1000 {
		c := d.handshake("polling")
		switch i % 4 {
		case 0: // no more than a handshake
		case 1:
			c.post("40")
		case 2:
			c.post("40\x1e" + `42["join-admin"]`) // too early for an event: the session ends
		case 3:
			c.connect()
			c.join(strconv.Itoa(i))
		}
	}
	d.waitHealth("connections", 0)
	d.waitHealth("sessions", 0)
	goroutines(t, before)
}

// TestDuplicatePoll: one of the two is told that the session is over, the other is refused.
func TestDuplicatePoll(t *testing.T) {
	d := start(t)
	for range 20 {
		c := d.dial("polling")
		answers := make(chan string)
		for range 2 {
			go func() {
				status, answer, err := c.poll()
				answers <- fmt.Sprint(status, " ", answer, err)
			}()
		}
		got := []string{<-answers, <-answers}
		slices.Sort(got)
		if want := []string{"200 1<nil>", "400 two polls at once\n<nil>"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		if status, answer, err := c.poll(); status != 400 {
			t.Errorf("a third poll: got %d %s, %v", status, answer, err)
		}
		d.waitHealth("connections", 0)
	}
}

// TestTwoPosts: a second POST at once ends the session, as in Node.
func TestTwoPosts(t *testing.T) {
	d := start(t)
	c := d.dial("polling")
	d.raw(fmt.Sprintf("POST %s&sid=%s HTTP/1.1\nHost: 127.0.0.1\nContent-Length: 9\n\n4", handshakePath, c.sid))
	for deadline := time.Now().Add(patience); ; { // until the first is under way
		status, answer := c.post("3")
		if status == 400 && (answer == "two posts at once\n" || strings.Contains(answer, "unknown")) {
			break
		}
		if status != 200 || time.Now().After(deadline) {
			t.Fatalf("got %d %s, want 400", status, answer)
		}
	}
	d.waitHealth("connections", 0)
}

// TestAbortedPoll: it ends the session.
func TestAbortedPoll(t *testing.T) {
	d := start(t)
	for range 20 {
		c := d.dial("polling")
		c.join("5")
		d.raw(fmt.Sprintf("GET %s&sid=%s HTTP/1.1\nHost: localhost\n\n", handshakePath, c.sid)).Close()
		d.waitHealth("connections", 0)
		d.waitHealth("sessions", 0)
		if status, answer, err := c.poll(); status != 400 || answer != `{"code":1,"message":"Session ID unknown"}` {
			t.Errorf("the next poll: got %d %s, %v, want 400", status, answer, err)
		}
	}
	// A poll that comes when the abort is known and the session perhaps not yet ended: too short a moment for a client.
	s := newTestServer(t)
	d = serveOn(t, s)
	gone, abort := context.WithCancel(t.Context())
	abort()
	for range 20 {
		c := d.dial("polling")
		path := handshakePath + "&sid=" + c.sid
		if status, answer := s.serveHTTP(gone, "GET", path, ""); status != 400 || answer != context.Canceled.Error()+"\n" {
			t.Errorf("the aborted poll: got %d %s", status, answer)
		}
		if status, answer := s.serveHTTP(t.Context(), "GET", path, ""); status != 400 {
			t.Errorf("the poll behind it: got %d %s, want 400", status, answer)
		}
		d.waitHealth("connections", 0)
	}
}

// TestClientCloses: CLOSE ends the poll that waits, also one that is overtaken by it.
func TestClientCloses(t *testing.T) {
	d := start(t)
	for i := range 200 {
		c := d.handshake("polling")
		polled := make(chan string)
		go func() {
			status, answer, err := c.poll()
			polled <- fmt.Sprint(status, " ", answer, err)
		}()
		if status, answer := c.post("1"); status != 200 || answer != "ok" {
			t.Errorf("CLOSE: got %d %s", status, answer)
		}
		if got, want := <-polled, "200 6<nil>"; got != want {
			t.Errorf("%d: the poll: got %s, want %s", i, got, want)
		}
		if status, answer, _ := c.poll(); status != 400 {
			t.Errorf("%d: a poll afterwards: got %d %s, want 400", i, status, answer)
		}
	}
	for _, transport := range []string{"websocket", "upgraded"} {
		c := d.dial(transport)
		c.join("5")
		c.send("1")
		if packet, err := c.next(); err != io.EOF || len(c.closing) != 2 {
			t.Errorf("%s: got %q, %v, want a close frame", transport, packet, err)
		}
		if err := c.write(0x88, "\x03\xe8"); err != nil { // socket.io-client's own meets an open socket
			t.Errorf("%s: %v", transport, err)
		}
		if _, err := c.br.ReadByte(); err != io.EOF {
			t.Errorf("%s: got %v, want the end and no reset", transport, err)
		}
		c.conn.Close()
	}
	d.waitHealth("connections", 0)
	d.waitHealth("sessions", 0)
}

// TestSubprotocol: socket.io-client's option protocols, which a browser wants answered.
func TestSubprotocol(t *testing.T) {
	t.Parallel()
	d := start(t)
	for header, want := range map[string]string{"": "", "Sec-WebSocket-Protocol: chat": "chat", "Sec-WebSocket-Protocol: v2.chat , chat": "v2.chat"} {
		c := d.handshake("websocket", header)
		if c.connect(); c.protocol != want {
			t.Errorf("%q: got %q, want %q", header, c.protocol, want)
		}
	}
}

// TestInvalidFrames: what RFC 6455 forbids ends the connection, what it allows does not.
func TestInvalidFrames(t *testing.T) {
	t.Parallel()
	d := start(t)
	ping := masked(0x81, `42["ping"]`)
	for name, frames := range map[string][]byte{
		"a frame without mask":       {0x81, 1, '3'},
		"a reserved opcode":          masked(0x83, "3"),
		"a reserved control opcode":  masked(0x8b, "3"),
		"a reserved bit":             masked(0xc1, "3"),
		"a continuation of nothing":  masked(0x80, "3"),
		"a message inside another":   append(masked(0x01, `42["pi`), ping...),
		"a fragmented control frame": masked(0x09, "x"),
		"a long control frame":       masked(0x89, strings.Repeat("x", 126)),
		"a close of one byte":        masked(0x88, "x"),
		"a close":                    masked(0x88, ""),
		"a length of 2^63":           {0x81, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a length of 2^63-1":         {0x81, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"a length over the limit":    masked(0x81, strings.Repeat("x", maxMessage+1))[:8],
		"a binary message":           masked(0x82, "x"),
		"an empty message":           masked(0x81, ""),
		"a text that is not UTF-8":   masked(0x81, "42[\"ping\",\"\xff\"]"),
	} {
		c := d.dial("websocket")
		c.conn.Write(frames)
		c.expectEnd()
		if invalid := []byte{1007 >> 8, 1007 & 0xff}; name == "a text that is not UTF-8" && !bytes.Equal(c.closing, invalid) {
			t.Errorf("%s: close frame: got % x, want % x", name, c.closing, invalid)
		}
		c.conn.Close()
		d.waitHealth("connections", 0)
	}
	c := d.dial("websocket")
	for _, frames := range [][]byte{
		ping, slices.Concat(masked(0x01, `42["`), masked(0x00, ""), masked(0x89, ""), masked(0x00, `pin`), masked(0x80, `g"]`)), // fragments, a control frame between them
		slices.Concat(masked(0x8a, "pong"), ping), {0x81, 0x80 | 126, 0, 10, 1, 2, 3, 4, '4' ^ 1, '2' ^ 2, '[' ^ 3, '"' ^ 4, 'p' ^ 1, 'i' ^ 2, 'n' ^ 3, 'g' ^ 4, '"' ^ 1, ']' ^ 2},
	} {
		c.conn.Write(frames)
		for {
			packet, err := c.next()
			if err != nil && strings.HasPrefix(err.Error(), "frame of kind 0x8a") {
				continue // the answer to WebSocket's own ping
			}
			if err != nil || !strings.HasPrefix(packet, `42["pong"`) {
				t.Fatalf("% x: got %s, %v", frames, packet, err)
			}
			break
		}
	}
}

// TestReaderPanics: a panic while a client is read ends its connection, and not the process.
func TestReaderPanics(t *testing.T) {
	s, l := newLoggedServer(t, slog.LevelInfo)
	s.library = nil // a CONNECT needs it
	d := serveOn(t, s)
	c := d.handshake("websocket")
	c.send("40")
	c.expectEnd()
	d.waitHealth("connections", 0)
	l.wait(t, `level=ERROR msg="reading from a client failed" error="runtime error: .*" stack=`)
}

// TestProbes: an upgrade that comes to nothing leaves the session polling.
func TestProbes(t *testing.T) {
	t.Parallel()
	d := start(t)
	c := d.dial("polling")
	c.join("5")
	for name, frames := range map[string][]byte{
		"nothing": nil, "a probe": masked(0x81, "2probe"), "another ping": masked(0x81, "2x"), "a message": masked(0x81, `42["ping"]`),
		"an invalid packet": masked(0x81, "abc"), "binary": masked(0x82, "x"), "CLOSE": masked(0x81, "1"), "a close frame": masked(0x88, ""), "a PONG": masked(0x81, "3"),
	} {
		probe := &client{t: t, d: d}
		for deadline := time.Now().Add(patience); probe.tryWebSocket(c.sid) != 101; { // as soon as the last one is forgotten
			if time.Now().After(deadline) {
				t.Fatalf("%s: no upgrade", name)
			}
		}
		second := &client{t: t, d: d}
		if second.tryWebSocket(c.sid) == 101 && frames == nil {
			second.expectEnd() // one at a time
		}
		probe.conn.Write(frames)
		probe.conn.Close()
		c.expectNothing("5")
	}
	c.sid = d.handshake("polling").sid // a session of its own for the race of two UPGRADEs
	first, second := &client{t: t, d: d, sid: c.sid}, &client{t: t, d: d, sid: c.sid}
	first.tryWebSocket(c.sid)
	second.tryWebSocket(c.sid)
	for _, c := range []*client{first, second} {
		if c.conn != nil {
			c.write(0x81, "5")
			c.conn.Close()
		}
	}
	d.waitHealth("connections", 1)
}

// TestOvertakenUpgrade: a poll that comes behind the answer to the probe is refused if UPGRADE follows, else let go.
func TestOvertakenUpgrade(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, upgrades := range []bool{true, false} {
		want := map[bool]string{true: "400 " + errUpgraded.Error() + "\n<nil>", false: "200 6<nil>"}[upgrades]
		eventually(t, func() string { // UPGRADE may overtake the poll
			c := d.dial("polling")
			polling := *c
			c.dialWebSocket(c.sid)
			c.send("2probe")
			c.expect("3probe")
			answered := make(chan string)
			began := time.Now()
			go func() {
				status, answer, err := polling.poll()
				answered <- fmt.Sprint(status, " ", answer, err)
			}()
			if upgrades {
				c.send("5")
			}
			if got := <-answered; got != want {
				return fmt.Sprintf("upgrades: %v: got %q, want %q", upgrades, got, want)
			}
			if waited := time.Since(began) >= upgradeDelay; !waited && !upgrades {
				t.Errorf("let go after %v", time.Since(began))
			}
			return ""
		})
	}
}

// TestAfterUpgrade: what still comes for the session by HTTP is refused at once, and harms nobody.
func TestAfterUpgrade(t *testing.T) {
	d := start(t)
	upgraded, ws := d.dial("upgraded"), d.dial("websocket")
	for _, c := range []*client{upgraded, ws} {
		for _, method := range []string{"GET", "POST", "PUT", "HEAD"} {
			for _, transport := range []string{"polling", "websocket", "webtransport", ""} {
				conn := d.raw(fmt.Sprintf("%s /socket.io/?EIO=4&transport=%s&sid=%s HTTP/1.1\nHost: localhost\nConnection: close\nContent-Length: 0\n\n", method, transport, c.sid))
				conn.SetDeadline(time.Now().Add(patience / 2))
				if status, body, err := answer(conn); status != 400 && err == nil || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%s, transport %q: got %d %s, %v, want 400", method, transport, status, body, err)
				}
			}
		}
		again := &client{t: t, d: d} // is taken and closed: 400 is an error to the suites' client
		if got := again.tryWebSocket(c.sid); got != 101 {
			t.Errorf("another WebSocket: got %d, want 101", got)
		} else {
			again.expectEnd()
		}
		c.emit("ping")
		c.expect(`42["pong"`)
	}
	// A client that does not wait: UPGRADE, and another request behind it.
	for i := range 200 {
		c := d.dial("polling")
		polling := *c
		c.dialWebSocket(c.sid)
		c.send("2probe")
		c.send("5")
		if i%2 == 0 {
			if status, answer, err := polling.poll(); status != 400 {
				t.Errorf("a poll behind UPGRADE: got %d %s, %v, want 400", status, answer, err)
			}
		} else {
			again, began := &client{t: t, d: d}, time.Now()
			if status := again.tryWebSocket(c.sid); status != 101 {
				t.Errorf("another WebSocket behind UPGRADE: got %d, want 101", status)
			} else if again.expectEnd(); time.Since(began) > patience/4 {
				t.Errorf("another WebSocket behind UPGRADE: closed after %v", time.Since(began))
			}
		}
		c.expect("3probe")
		c.emit("ping")
		c.expect(`42["pong"`)
		c.conn.Close()
	}
	d.waitHealth("connections", 2)
}

// TestAbortAfterUpgrade: who gives up a poll that an upgrade has just made needless keeps the session.
func TestAbortAfterUpgrade(t *testing.T) {
	s := &session{wire: &wire{}}
	s.changed.L = &s.mu
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.fetch(ctx, http.NewResponseController(httptest.NewRecorder())); err != errUpgraded || s.state != open {
		t.Errorf("got %v, want %v", err, errUpgraded)
	}
}

// TestEndBeforeUpgrade: what waits when a session ends goes by the wire, if the client has stopped to poll for it.
func TestEndBeforeUpgrade(t *testing.T) {
	d := start(t)
	c := d.dial("polling")
	c.join("5")
	polling := *c
	ended := make(chan string)
	go func() {
		_, answer, err := polling.poll()
		ended <- fmt.Sprint(answer, err)
	}()
	c.dialWebSocket(c.sid)
	c.send("2probe")
	c.expect("3probe")
	if got := <-ended; got != "6<nil>" {
		t.Fatalf("the poll got %s", got)
	}
	if n := d.broadcast(`{"channel":"chat-session.5","event":"last"}`) + d.broadcast(`{"channel":"chat-session.5","reconnect":true}`); n != 2 {
		t.Fatalf("delivered %d, want 2", n)
	}
	d.waitHealth("sessions", 0) // it ends
	c.send("5")
	c.expect(`42["last",{}]`)
	c.expect("1")
	if packet, err := c.next(); err != io.EOF || len(c.closing) != 2 {
		t.Errorf("got %q, %v, want a close frame", packet, err)
	}
	c.conn.Close()
	d.waitHealth("connections", 0)
}

// Under load: what the library gets wrong, and any server may. Each of these tests fails when what answers it is taken out.

// TestNoConnectIsLost sends CONNECT as soon as there is a connection, before the handshake's OPEN has come.
func TestNoConnectIsLost(t *testing.T) {
	d := start(t)
	each(3000, func(i int) {
		c := &client{t: t, d: d}
		c.dialWebSocket("")
		c.send("40")
		c.expect(`0{"`)
		c.expect(`40{"sid":"`)
		c.end()
	})
	each(500, func(i int) {
		c := d.dial("polling")
		c.emit("ping")
		c.expect(`42["pong"`)
		c.end()
	})
	d.waitHealth("connections", 0)
}

// TestNoEventIsLost sends an event as soon as CONNECT is acknowledged, which is before the library knows the socket.
func TestNoEventIsLost(t *testing.T) {
	d := start(t)
	each(3000, func(i int) {
		c := d.dial(transportNames[i%3])
		c.send(`42["join-session",{"sessionId":"5"}]`)
		c.expect(`42["joined-session"`)
		c.end()
	})
}

// numbered broadcasts {"n":0}, {"n":1} … to the sessions 0 … rooms-1 in turn until stop is called, which returns how many.
func (d *daemon) numbered(rooms int) (stop func() []int) {
	done, result := make(chan struct{}), make(chan []int)
	go func() {
		sent := make([]int, rooms)
		for room := 0; ; room = (room + 1) % rooms {
			select {
			case <-done:
				result <- sent
				return
			default:
				d.broadcast(fmt.Sprintf(`{"channel":"chat-session.%d","event":"n","data":%d}`, room, sent[room]))
				sent[room]++
			}
		}
	}()
	return func() []int {
		close(done)
		return <-result
	}
}

// sequence checks that a client's numbers follow one another, without gap, repetition or change of order.
type sequence struct {
	next    int
	started bool
}

// read takes the packets up to one that begins with until, and reports what is out of order.
func (s *sequence) read(c *client, until string) error {
	for {
		packet, err := c.next()
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", until, err)
		}
		if strings.HasPrefix(packet, until) {
			return nil
		}
		if err := s.take(packet); err != nil {
			return err
		}
	}
}

// take looks at one packet.
func (s *sequence) take(packet string) error {
	if packet == "6" || strings.HasPrefix(packet, `42["for-`) { // a NOOP, or for another visitor of the room
		return nil
	}
	var n int
	if _, err := fmt.Sscanf(packet, `42["n",%d]`, &n); err != nil {
		return fmt.Errorf("got %.100s", packet)
	}
	if s.started && n != s.next {
		return fmt.Errorf("got number %d, want %d", n, s.next)
	}
	s.next, s.started = n+1, true
	return nil
}

// TestNoMemberIsLost has 200 visitors join, leave and reload in 20 rooms, so that leaves meet joins of the same
// room, while messages go to all. Each sees all of its room's messages from its join to its leave, and no other.
func TestNoMemberIsLost(t *testing.T) {
	d := start(t)
	const rooms, visitors, visits = 20, 200, 10
	stop := d.numbered(rooms)
	each(visitors, func(i int) {
		transport := []string{"websocket", "websocket", "polling", "upgraded"}[i%4]
		room := fmt.Sprint(i % rooms)
		c := d.dial(transport)
		for visit := range visits {
			var seen sequence
			c.emit("join-session", `{"sessionId":"`+room+`"}`)
			err := seen.read(c, `42["joined-session"`)
			for try := 0; err == nil && try < 2; try++ { // what is sent from here on has to arrive
				d.broadcast(fmt.Sprintf(`{"channel":"chat-session.%s","event":"for-%s"}`, room, c.id))
				err = seen.read(c, `42["for-`+c.id)
			}
			if err == nil {
				c.emit("leave-session", `{"sessionId":"`+room+`"}`)
				err = seen.read(c, `42["left-session"`)
			}
			if err == nil {
				c.emit("ping")
				if packet, _ := c.next(); !strings.HasPrefix(packet, `42["pong"`) {
					err = fmt.Errorf("after left-session: got %.100s", packet)
				}
			}
			if err != nil {
				t.Errorf("visitor %d (%s), visit %d: %v", i, transport, visit, err)
				return
			}
			if visit%3 == 2 { // reload the page
				c.end()
				c = d.dial(transport)
			}
		}
		c.end()
	})
	stop()
	d.waitHealth("connections", 0)
	d.waitHealth("sessions", 0)
}

// TestUpgradeUnderLoad upgrades while messages come in, and they come in order, each once.
func TestUpgradeUnderLoad(t *testing.T) {
	d := start(t)
	const clients = 60
	stop := d.numbered(1)
	each(clients, func(i int) {
		c := d.dial("polling")
		var seen sequence
		var err error
		c.emit("join-session", `{"sessionId":"0"}`)
		if err = seen.read(c, `42["joined-session"`); err == nil {
			c.emit("ping")
			err = seen.read(c, `42["pong"`)
		}
		// Probe while polls go on, as a client does whose poll is under way, then end with UPGRADE.
		ws := &client{t: t, d: d}
		ws.dialWebSocket(c.sid)
		ws.send("2probe")
		ws.expect("3probe")
		for poll := 0; err == nil && poll < 3; poll++ {
			var answer string
			if _, answer, err = c.poll(); err == nil {
				for _, packet := range append(c.polled, strings.Split(answer, "\x1e")...) {
					err = errors.Join(err, seen.take(packet))
				}
				c.polled = nil
			}
		}
		ws.send("5")
		ws.emit("ping")
		if err == nil {
			err = seen.read(ws, `42["pong"`)
		}
		if err == nil {
			d.broadcast(`{"channel":"chat-session.0","event":"for-` + c.id + `"}`)
			err = seen.read(ws, `42["for-`+c.id)
		}
		if err != nil {
			t.Errorf("client %d: %v", i, err)
		}
		if seen.next == 0 {
			t.Errorf("client %d saw no number", i)
		}
		ws.end()
	})
	stop()
}

// TestNoGhosts closes connections in each phase of their opening, and looks for what is left of them.
func TestNoGhosts(t *testing.T) {
	d := start(t)
	const clients = 6000
	goroutinesBefore, heap := runtime.NumGoroutine(), liveHeap()
	t.Run("clients", func(t *testing.T) { // which let go of what is theirs when it ends
		d := &daemon{t: t, addr: d.addr}
		each(clients, func(i int) {
			c := d.handshake([]string{"websocket", "websocket", "polling"}[i%3])
			if i%6 != 0 {
				c.send("40")
			}
			if i%4 > 1 && c.conn != nil {
				c.send(`42["join-session",{"sessionId":"5"}]`) // before the CONNECT is answered: an error to the protocol
			}
			if c.conn != nil {
				c.conn.Close()
			} else {
				c.post("1") // and does not fetch the answer
			}
		})
	})
	d.waitHealth("connections", 0)
	d.waitHealth("sessions", 0)
	if n := d.broadcast(`{"channel":"chat-session.5","event":"e"}`); n != 0 {
		t.Errorf("delivered %d, want 0", n)
	}
	goroutines(t, goroutinesBefore)
	eventually(t, func() string { // timers of who ended hold their sessions for closeTimeout
		if grown := liveHeap() - heap; grown > clients*100 {
			return fmt.Sprintf("%d bytes are left of %d clients", grown, clients)
		}
		return ""
	})
}

// TestAbortedPolls gives up polls while the daemon answers them: that crashes the library's own transport
// within seconds, or sends one client's bytes to another.
func TestAbortedPolls(t *testing.T) {
	d := start(t)
	const rooms = 8
	stop := d.numbered(rooms)
	pool := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}
	each(1000, func(i int) {
		c := d.dial("polling")
		room := fmt.Sprint(i % rooms)
		c.emit("join-session", `{"sessionId":"`+room+`"}`)
		for try := range 10 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i*try%40)*100*time.Microsecond)
			req, _ := http.NewRequestWithContext(ctx, "GET", c.url(), nil)
			resp, err := pool.Do(req)
			if err == nil {
				var b []byte
				b, err = io.ReadAll(resp.Body)
				resp.Body.Close()
				for packet := range strings.SplitSeq(string(b), "\x1e") {
					switch {
					case err != nil, resp.StatusCode == 400: // given up, hence ended
					case strings.HasPrefix(packet, `42["joined-session",{"roomName":"session-`+room+`"`), packet == "1":
					case strings.HasPrefix(packet, `42["n",`):
					default:
						t.Errorf("room %s: got %d %.200s", room, resp.StatusCode, packet)
					}
				}
			}
			cancel()
		}
		c.post("1")
	})
	stop()
	d.waitHealth("connections", 0)
	d.waitHealth("sessions", 0)
}

// TestOneOrder has four post at once to rooms that overlap, and members on both transports and in the middle of an upgrade.
// All admins hear all messages in one order, and each guest hears its session's in the same.
func TestOneOrder(t *testing.T) {
	d := start(t)
	const members, messages = 24, 200
	posted := make(chan struct{})
	heard := make([][]string, members)
	var ready, all sync.WaitGroup
	ready.Add(members)
	for i := range members {
		c := d.dial([]string{"websocket", "polling"}[i%2])
		if i%3 == 0 {
			c.join("0")
		} else {
			c.joinAdmin()
		}
		all.Go(func() {
			defer c.end() // or the daemon's stop waits for it
			ready.Done()
			<-posted
			for len(heard[i]) == 0 || heard[i][len(heard[i])-1] != `"end"]` {
				if i%4 == 1 && c.conn == nil && len(heard[i]) > messages/4 {
					c.upgrade()
				}
				packet, err := c.next()
				n, ok := strings.CutPrefix(packet, `42["n",`)
				if err != nil || !ok && packet != "6" {
					t.Errorf("member %d: got %.50s, %v", i, packet, err)
					return
				}
				if ok {
					heard[i] = append(heard[i], n)
				}
			}
		})
	}
	ready.Wait()
	close(posted)
	each(4, func(poster int) {
		for n := range messages {
			d.broadcast(fmt.Sprintf(`{"channel":"chat-session.%d","event":"n","data":"%d of %d"}`, n%2, n, poster))
		}
	})
	d.broadcast(`{"channel":"chat-session.0","event":"n","data":"end"}`)
	all.Wait()
	if len(heard[1]) != 4*messages+1 {
		t.Fatalf("an admin heard %d messages, want %d", len(heard[1]), 4*messages+1)
	}
	var session0 []string
	for _, n := range heard[1] {
		var at, poster int
		if fmt.Sscanf(n, `"%d of %d"]`, &at, &poster); at%2 == 0 {
			session0 = append(session0, n)
		}
	}
	for i := range members {
		want := heard[1]
		if i%3 == 0 {
			want = session0
		}
		if !slices.Equal(heard[i], want) {
			t.Errorf("member %d heard %d messages in another order than member 1", i, len(heard[i]))
		}
	}
}

// TestLeaveBetween: who leaves when a message is in its queue and not yet written gets it, and then left-session.
func TestLeaveBetween(t *testing.T) {
	t.Parallel()
	d := start(t)
	for _, transport := range transportNames {
		c := d.dial(transport)
		c.join("5")
		d.fill(c, "5")
		if n := d.broadcast(`{"channel":"chat-session.5","event":"last"}`); n != 1 {
			t.Errorf("%s: delivered %d, want 1", transport, n)
		}
		c.emit("leave-session", `{"sessionId":"5"}`)
		d.waitHealth("sessions", 0)
		c.expectFilling()
		c.expect(`42["last",{}]`)
		c.expect(`42["left-session"`)
		c.end()
	}
}

// Fuzzing

// hostilePackets is what no client of the daemon sends. They are seeds as well.
var hostilePackets = []string{
	``, `4`, `40`, `41`, `42`, `43`, `44`, `45`, `46`, `47`, `49`, `0`, `1`, `2`, `3`, `5`, `6`, `7`, `2probe`, `3probe`, `b`, `bAAAA`, `b!`, "\x1e", "\x1e\x1e4", "42[\"ping\"]\x1e42[\"ping\"]",
	`42[]`, `42[null]`, `42[1]`, `42[1e400]`, `42[-0]`, `42{}`, `42"x"`, `42["ping"`, `42["ping"]x`, `42["connect"]`, `42["disconnecting"]`, `42["error"]`, `42["error",{"message":"x"}]`, `42["newListener"]`, `42[""]`, `42[["ping"]]`,
	`420["ping"]`, `4218446744073709551615["ping"]`, `4299999999999999999999["ping"]`, `42-1["ping"]`, `42/,["ping"]`, `42/x,["ping"]`, `42/x,1["ping"]`, `42/` + strings.Repeat("x", 600) + `,["ping"]`,
	`430[]`, `431["x"]`, `4318446744073709551615[1]`, `43{}`, `43`, `460-1[]`, `461-1[{"_placeholder":true,"num":0}]`,
	`450-["ping"]`, `451-["ping",{"_placeholder":true,"num":0}]`, `451-["ping",{"_placeholder":true,"num":-1}]`, `451-["ping",{"_placeholder":true,"num":1e300}]`, `451-["ping",{"_placeholder":1,"num":"x"}]`,
	`459999999-["ping"]`, `4518446744073709551615-["ping"]`, `45-1-["ping"]`, `45-["ping"]`, `451["ping"]`, `451-`, `451-/x,["ping"]`, `4510-["ping"` + strings.Repeat(`,{"_placeholder":true,"num":9}`, 10) + `]`,
	`40{`, `40{}`, `40[]`, `40{"pid":"x","offset":"y"}`, `40{"pid":1,"offset":{}}`, `40/`, `40/,`, `40/x`, `40//`, `40/x?y=z,{"a":1}`, `40{"a":` + strings.Repeat(`[0,`, 2000), `44{"message":"x"}`, `44"x"`, `41{}`, `41/x`,
	`42["join-session",` + strings.Repeat(`[`, 5000) + strings.Repeat(`]`, 5000) + `]`, `42["join-session",{"sessionId":` + strings.Repeat(`{"a":`, 1000), `42` + strings.Repeat(`[`, 10000),
	`42["join-session",{"sessionId":"5","userType":{}}]`, `42["join-session",{"sessionId":1e15}]`, `42["join-session",{"sessionId":1e300}]`, `42["join-session",{"sessionId":"` + strings.Repeat("x", 200) + `"}]`, `42["join-session",{"sessionId":"a:b","auth":[]}]`,
	`42["join",{"channel":"private-x"}]`, `42["join",{"channel":"presence-x"}]`, `42["join",{"channel":5}]`, `42["join"]`, `42["leave",{"channel":"private-x"}]`, `42["leave",[]]`,
	`42["whisper",{"channel":"private-x","event":"typing","data":{}}]`, `42["whisper",{"channel":"witness"}]`, `42["whisper"]`, `421["join",{"channel":"chat-session.5","auth":"x"}]`,
	`42["join-admin",{"auth":{}}]`, `42["join-admin",[]]`, `42["leave-session"]`, `42["leave-session",{"sessionId":null}]`, "42[\"\xff\xfe\"]", "42[\"join-session\",{\"sessionId\":\"\xc3\x28\"}]", "42[\"\\ud800\"]", "42[\"\x00\"]", "\xff", "4\xff", "\xf0\x9f\x98\x80",
}

// witness is a daemon with a member, to whom broadcasts have to get through whatever others do.
type witness struct {
	*client
	d *daemon
	n int
}

func newWitness(t testing.TB, env ...string) *witness {
	d := start(t, env...)
	w := &witness{client: d.dial("websocket"), d: d}
	w.conn.SetDeadline(time.Time{}) // it lives longer than one test
	w.join("witness")
	return w
}

// check fails unless the daemon still works and holds nothing but the witness.
func (w *witness) check(t *testing.T) {
	t.Helper()
	w.t, w.d.t = t, t
	w.n++
	w.d.broadcast(fmt.Sprintf(`{"channel":"chat-session.witness","event":"w","data":%d}`, w.n))
	w.expect(fmt.Sprintf(`42["w",%d]`, w.n))
	w.d.waitHealth("connections", 1)
	w.d.waitHealth("sessions", 1)
	w.d.waitHealth("admins", 0)
	if l := w.d.logs.String(); strings.Contains(l, "level=ERROR") || strings.Contains(l, "panic") {
		t.Fatalf("the log:\n%.3000s", l)
	}
}

// FuzzBroadcast: whatever the body, it is a refusal, or a frame that is whole and carries the data as it came.
func FuzzBroadcast(f *testing.F) {
	for _, body := range []string{
		`{"channel":"chat-session.5","event":"e","data":{"a":[1,2.50,"\u2028"]}}`, `{"channels":["private-chat-session.5","presence-admin-chat"],"event":"é","socket":"x"}`,
		`{"channel":"admin-chat","event":"connect"}`, `{"channel":"admin-chat","event":"e","data":1e400}`, `{"channel":"admin-chat","event":"e","data":"\ud800"}`, `{"channel":"admin-chat","channel":1,"event":"e"}`,
		`{}`, `[]`, `null`, ``, "{\"channel\":\"admin-chat\",\"event\":\"\xff\"}", `{"channel":"admin-chat","event":"e","data":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "}",
		"{\"channel\":\"admin-chat\",\"event\":\"e\",\"data\": \t\n{ } }", `{"channel":"chat-session.a:b","event":"e"}`, `{"channel":"admin-chat","event":"\u0000\u001e"}`,
		`{"channels":["private-x","chat-session.5","y"],"event":"e","data":[]}`, `{"channel":"presence-x","event":"e"}`, "\ufeff" + `{"channel":"private-x","event":"broadcast"}`,
	} {
		f.Add([]byte(body))
	}
	d := start(f)
	ws, poller := d.dial("websocket"), d.dial("polling")
	ws.conn.SetDeadline(time.Time{}) // it lives longer than one test
	for _, c := range []*client{ws, poller} {
		c.joinAdmin()
		c.emit("join", `{"channel":"private-x"}`)
		c.expect(`42["joined"`)
	}
	f.Cleanup(poller.end) // or the daemon's stop waits for it
	f.Fuzz(func(t *testing.T, body []byte) {
		d.t, ws.t, poller.t = t, t, t
		status, answer, _ := d.request("POST", "/broadcast", string(body))
		var got struct {
			Success   bool
			Error     string
			Delivered int
		}
		if err := json.Unmarshal([]byte(answer), &got); err != nil || got.Success != (status == 200) || got.Success != (got.Error == "") || !slices.Contains([]int{200, 400, 413}, status) {
			t.Fatalf("got %d %s", status, answer)
		}
		if status == 200 {
			var fields map[string]json.RawMessage // an unmarshalled struct matches names of any case
			if err := json.Unmarshal(bytes.TrimPrefix(body, []byte("\ufeff")), &fields); err != nil {
				t.Fatal(err)
			}
			var sent string
			json.Unmarshal(fields["event"], &sent)
			data := string(fields["data"])
			if data == "" {
				data = "{}"
			}
			m, err := parseBroadcast(body)
			if err != nil {
				t.Fatal(err)
			}
			copies := 0
			for _, room := range m.rooms() {
				if room == adminRoom || room == channelRoom("private-x") {
					copies++
				}
			}
			if got.Delivered != 2*copies {
				t.Fatalf("delivered %d, want %d", got.Delivered, 2*copies)
			}
			for _, c := range []*client{ws, poller} {
				for range copies {
					packet := c.expect("42")
					var event []json.RawMessage
					var name string
					if err := json.Unmarshal([]byte(packet), &event); err != nil || len(event) != 2 || json.Unmarshal(event[0], &name) != nil || !utf8.ValidString(packet) {
						t.Fatalf("got %q, sent %q", packet, body)
					}
					asChat := name == sent && strings.HasSuffix(packet, ","+data+"]")
					asChannel := name == "broadcast" && strings.HasPrefix(string(event[1]), `{"channel":"private-x","event":`) && strings.HasSuffix(packet, `,"data":`+data+"}]")
					if !asChat && !asChannel {
						t.Fatalf("got %q, sent %q", packet, body)
					}
				}
			}
		}
		d.broadcast(`{"channel":"admin-chat","event":"next"}`)
		for _, c := range []*client{ws, poller} {
			c.expect(`42["next",{}]`)
		}
	})
}

// FuzzRedisMessage: whatever is added, a message is delivered only if it is signed, in time, and one that /broadcast could have made.
func FuzzRedisMessage(f *testing.F) {
	for message := range hostileMessages(testSecret) {
		if len(message) < 5000 {
			_, message, _ = strings.Cut(message, "\n")
			f.Add(message, byte(0))
			f.Add(message, byte(1))
		}
	}
	f.Add(`{"id":"x","until":1000,"channels":["chat-session.5","admin-chat"],"except":"y","event":"é"}`+"\n"+` {"a":[1.50,"`+"\u2028"+`<"]} `, byte(1))
	f.Add(`{"ID":"x","Until":999,"Channels":["admin-chat"],"event":"\ud800"}`+"\n"+`1e400`, byte(1))
	f.Add(`{"id":"x","until":1000,"channels":["private-x","y"],"event":"client-typing","whisper":true}`+"\n"+`1`, byte(1))
	c, log := newTestCluster(f, "SOCKETIO_SECRET=the-new-secret-0123456789abcdef01234,"+testSecret)
	f.Fuzz(func(t *testing.T, message string, kind byte) {
		payload := message
		if kind&1 == 1 {
			payload = signMessage(testSecret, message)
		}
		hub, member := c.server.hub, &session{server: c.server}
		hub.enter(member, "member")
		defer hub.leaveAll(member)
		for _, room := range []string{"session-5", adminRoom, channelRoom("private-x")} {
			hub.join(member, room)
		}
		before := c.server.hub.deliveries.Load()
		c.deliver(1000, payload)
		delivered := c.server.hub.deliveries.Load() - before
		if strings.Contains(log.String(), "panicked") {
			t.Fatalf("the log:\n%.3000s", log)
		}
		m, err := c.unseal(payload)
		if delivered != 0 && (err != nil || m.Until < 1000) || err == nil && kind&1 == 0 {
			t.Fatalf("%q: %v, delivered %d", payload, err, delivered)
		}
		if err == nil && len(m.Channels) > 0 { // it is no beat
			var event []json.RawMessage
			for _, packet := range [][]byte{m.frameFor("").text, m.frameFor("private-x").text} {
				if json.Unmarshal(packet[2:], &event) != nil || len(event) != 2 || !utf8.Valid(packet) || !strings.HasSuffix(message, "\n"+string(m.data)) {
					t.Fatalf("%q: got %q", payload, packet)
				}
			}
			for _, room := range m.rooms() {
				id, isSession := strings.CutPrefix(room, "session-")
				channel, isChannels := strings.CutPrefix(room, ":")
				if room != adminRoom && !(isSession && isSessionID(id)) && !(isChannels && isChannel(channel)) {
					t.Fatalf("%q: got room %q", payload, room)
				}
			}
		}
	})
}

// FuzzNames: what is accepted as a session's id or a channel's name is one of the contract, and its room is its own.
func FuzzNames(f *testing.F) {
	for _, name := range []string{"5", "-5", "a:b", "", "A-Z_a=z@0,9.;", "chat-session.5", "private-", "private-chat-session.5", "presence-x", "session-5", "admin-room", "admin-chat",
		"private-admin-chat", "a\n", "ä", "\xff", strings.Repeat("a", 128), strings.Repeat("a", 129), strings.Repeat("a", 164), strings.Repeat("a", 165)} {
		f.Add(name, `"5"`)
	}
	for _, raw := range []string{`5`, `-0`, `1.5`, `1e3`, `9007199254740993`, `null`, `{}`, `"\u0035"`, `""`} {
		f.Add("x", raw)
	}
	valid := func(name string, most int) bool {
		const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-=@,.;"
		return name != "" && len(name) <= most && !strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune(allowed, r) })
	}
	f.Fuzz(func(t *testing.T, name, raw string) {
		quoted, _ := json.Marshal(name)
		p, err := sessionPlace(&argument{SessionID: quoted})
		if utf8.ValidString(name) && ((err == nil) != valid(name, 128) || err == nil && p.room != "session-"+name) {
			t.Errorf("session %q: got %+v, %v", name, p, err)
		}
		if json.Valid([]byte(raw)) {
			p, err := sessionPlace(&argument{SessionID: json.RawMessage(strings.TrimSpace(raw))})
			if id := strings.TrimPrefix(p.room, "session-"); err == nil && (!valid(id, 128) || p.signedName != "chat-session."+id) {
				t.Errorf("session %s: got %+v", raw, p)
			}
		}
		p, err = channelPlace(name)
		if err == nil && (!valid(name, 164) || p.room != ":"+name || strings.HasPrefix(name, "presence-")) {
			t.Errorf("channel %q: got %+v", name, p)
		}
		channel, channelErr := parseChannel(name)
		isChats := channel.chatRoom != ""
		if err == nil && (p.signedName != name) != isChats || err == nil && isChats && (channel.prefix != "private-" || p.signedName != channel.plain) {
			t.Errorf("channel %q: got %+v", name, p)
		}
		isNoSession := strings.HasPrefix(channel.plain, "chat-session.") && !isChats
		if (channelErr == nil) != (valid(name, 164) && !isNoSession) {
			t.Errorf("channel %q: got %+v, %v", name, channel, channelErr)
		}
		if channelErr != nil {
			return
		}
		for _, room := range (&message{Channels: []string{name}}).rooms() {
			id, isSession := strings.CutPrefix(room, "session-")
			byName, isByName := strings.CutPrefix(room, ":")
			switch {
			case !isByName && room != adminRoom && (!isSession || channel.plain != "chat-session."+id):
				t.Errorf("channel %q: got room %q", name, room)
			case isByName && byName != name && (!isChats || byName != "private-"+channel.plain):
				t.Errorf("channel %q: got channel %q", name, byName)
			}
		}
	})
}

// FuzzAuth: only the right signature joins, and only the right token broadcasts.
func FuzzAuth(f *testing.F) {
	d := start(f, "SOCKETIO_SECRET="+testSecret)
	f.Add(`"x"`, "Bearer x", byte(0), byte(0))
	f.Add(`null`, "Bearer "+testSecret+" ", byte(5), byte('A'))
	f.Add(`["x"]`, "bearer "+testSecret, byte(63), byte('g'))
	f.Add(`{"0":"x"}`, testSecret, byte(64), byte(' '))
	f.Add(`""`, "Bearer "+testSecret, byte(64), byte('x'))
	f.Add(`"x"}],["`, "Bearer 0123456789abcdef-secre", byte(7), byte(0))
	f.Fuzz(func(t *testing.T, auth, header string, at, with byte) {
		d.t = t
		c := d.dial("websocket")
		try := func(auth string, want bool) {
			var v any // what isn't one to Go, such as 1e400, ends the connection
			if json.Unmarshal([]byte(auth), &v) != nil || !utf8.ValidString(auth) || len(auth) > 8<<10 {
				return
			}
			answer, _ := c.call("join-session", `{"sessionId":"5","auth":`+auth+`}`)
			if got := strings.HasPrefix(answer, `["joined-session",`); got != want || !got && !strings.HasPrefix(answer, `["error",`) {
				t.Fatalf("auth %s: got %s", auth, answer)
			}
		}
		good := sign(testSecret, c.id, "chat-session.5")
		var text string
		isGood := json.Unmarshal([]byte(auth), &text) == nil && text == good
		try(auth, isGood)
		changed := []byte(good + "0")
		changed[int(at)%len(changed)] = with
		if with < utf8.RuneSelf {
			b, _ := json.Marshal(strings.TrimSuffix(string(changed), "\x00"))
			try(string(b), string(changed) == good+"\x00" || strings.TrimSuffix(string(changed), "\x00") == good)
		}
		try(`"`+good+`"`, true)
		s := &server{config: config{secrets: []string{testSecret, "another-secret-0123456789abcdef0123"}}}
		if got, want := s.authorized(header), header == "Bearer "+testSecret || header == "Bearer another-secret-0123456789abcdef0123"; got != want {
			t.Errorf("%q: got %v", header, got)
		}
	})
}

// FuzzWebSocketPackets: a text message, and frames of any kind behind it.
func FuzzWebSocketPackets(f *testing.F) {
	for _, packet := range hostilePackets {
		f.Add(packet, []byte(nil))
	}
	for _, frames := range [][]byte{
		masked(0x82, "\x01"), masked(0x00, "x"), masked(0x80, "x"), masked(0x01, "42["), masked(0x83, "x"), masked(0xff, "x"), masked(0x88, ""), masked(0x88, "\x03\xe8bye"), masked(0x88, "x"), masked(0x89, "ping"), masked(0x09, "ping"), masked(0x8a, "pong"),
		{0x81, 5, 'h'}, {0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, {0x81, 0xfe, 0xff, 0xff, 0, 0, 0, 0, 'x'}, {0x81}, {0x81, 0x81, 1, 2, 3},
		slices.Concat(masked(0x01, `42["pi`), masked(0x89, ""), masked(0x80, `ng"]`)), bytes.Repeat(masked(0x81, "3"), 30), bytes.Repeat(masked(0x81, "40"), 5), slices.Concat(masked(0x81, "41"), masked(0x81, "40"), masked(0x81, `42["join-admin"]`)),
	} {
		f.Add(`451-["ping",{"_placeholder":true,"num":0}]`, frames)
		f.Add(`42["join-admin"]`, frames)
	}
	w := newWitness(f)
	f.Fuzz(func(t *testing.T, packet string, frames []byte) {
		w.d.t = t
		for _, connected := range []bool{true, false} {
			c := w.d.handshake("websocket")
			if connected {
				c.connect()
			}
			c.conn.Write(append(masked(0x81, packet), frames...))
			c.conn.(*net.TCPConn).CloseWrite() // what it has sent is read first
			c.gone()
		}
		w.check(t)
	})
}

// FuzzPollingPackets: a payload of one POST.
func FuzzPollingPackets(f *testing.F) {
	for _, packet := range hostilePackets {
		f.Add(packet)
		f.Add(packet + "\x1e42[\"ping\"]\x1ebAQID")
	}
	f.Add(strings.Repeat("41\x1e40\x1e", 10))
	f.Add(strings.Repeat("3\x1e", 50))
	w := newWitness(f)
	f.Fuzz(func(t *testing.T, payload string) {
		w.d.t = t
		for _, connected := range []bool{true, false} {
			c := w.d.handshake("polling")
			if connected {
				c.connect()
			}
			status, answer := c.post(payload)
			if !slices.Contains([]int{200, 400, 413}, status) || (status == 200) != (answer == "ok") {
				t.Fatalf("got %d %s", status, answer)
			}
			if status, answer := c.post("1"); status != 200 && !strings.Contains(answer, "Session ID unknown") {
				t.Fatalf("CLOSE: got %d %s", status, answer)
			}
			if status, answer, err := c.poll(); err != nil || status != 200 && status != 400 { // so that the session need not wait for it
				t.Fatalf("the last poll: got %d %s, %v", status, answer, err)
			}
		}
		w.check(t)
	})
}
