// Command socketio is the chat server of a Laravel site that has left Pusher.
//
// Browsers connect to it with the official Socket.IO client and join the room of a chat session, or
// the admins' room. Laravel stores a message in its database, then posts it here, and everyone in the
// room sees it.
//
//	GET  /socket.io/  Socket.IO: protocol 5 over Engine.IO 4, by WebSocket and by HTTP long-polling
//	POST /broadcast   {"channel" or "channels", "event", "data", "socket"}: an event for the rooms' members
//	GET  /health      counters as JSON: 200, or 503 while stopping or out of reach of Redis
//
// A client sends join-session, join-admin, leave-session, leave-admin and ping. It is answered with joined-session,
// joined-admin, left-session, left-admin and pong, or with error.
//
// The environment configures it:
//
//	SOCKET_HOST      address to listen on (127.0.0.1)
//	SOCKET_PORT      port to listen on (3001; 0 picks a free one)
//	SOCKETIO_SECRET  shared with Laravel; unset is open mode: local requests only, without authentication
//	CORS_ORIGINS     origins whose pages may connect (localhost and 127.0.0.1, ports 8000 and 5173);
//	                 https://*.example.com = all subdomains, * = any; the server's own origin always may
//	REDIS_URL        redis:// or rediss://: joins this daemon to all others on the same Redis (unset)
//	MAX_CONNECTIONS  open Socket.IO connections (10000)
//	PING_INTERVAL    Engine.IO heartbeat (25s)
//	PING_TIMEOUT     how long a client has to answer it (20s)
//	LOG_LEVEL        debug, info, warn or error (info)
//
// How it works: handleBroadcast makes a frame of Laravel's event. With Redis it goes there, and comes back to each daemon.
// rooms puts it into the queue of each member's session, then flushes the members: a queue empties into the session's
// WebSocket by one system call, or into the answer to its poll. What a client sends comes from session.read (a WebSocket)
// or session.post (polling), passes admit, and goes through the library to onEvent, whose answer goes into the same queue.
//
// Goroutines: one for each WebSocket, which reads it; net/http's for each connection that polls or posts; one more for a
// client while it reads too slowly (session.drain). A heartbeat is a timer.
//
// Locks, in the order in which they are taken: session.receiving (one packet of a client at a time), room.flushing (one
// flush of a room at a time), rooms.mu (who is in which room, and the one order of all broadcasts), session.mu (its state
// and its queue). Nothing is written to a client under the last two. evictionList.mu is taken last.
package main

import (
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/zishang520/socket.io/parsers/engine/v3/packet"
	"github.com/zishang520/socket.io/servers/engine/v3"
	"github.com/zishang520/socket.io/servers/socket/v3"
	"github.com/zishang520/socket.io/v3/pkg/types"
)

// version is stamped by the build: go build -ldflags "-X main.version=1.2.3".
var version = "dev"

const (
	maxBody     = 1 << 20 // bytes of a /broadcast request: nginx's default client_max_body_size
	maxChannels = 100     // of one /broadcast: Pusher's limit, which Laravel code knows
	maxEvent    = 200     // characters of an event name: Pusher's limit
	maxRooms    = 100     // session rooms of one socket: an admin with a hundred chats open
	minSecret   = 32      // characters: any visitor has a signature to try guesses on, offline

	requestTimeout = 10 * time.Second // for a request's header, again for its body, and for its answer
	idleTimeout    = 90 * time.Second // of a kept-alive HTTP connection: longer than nginx's 60 s, so that nginx closes first
	maxHeader      = 16 << 10         // bytes: cookies are what makes one large, and a browser keeps 4 KiB of each
	connectTimeout = 10 * time.Second // from the handshake to Socket.IO's CONNECT: the client sends it at once
	joinTimeout    = time.Second      // a page joins a room sooner, but for the slowest; see handshake
	closeTimeout   = time.Second      // for a client to take what is on its way to it, and to answer a close

	// logBacklog is how many lines wait for a stderr that blocks: some 150 bytes each, so under 1 MB, and at
	// LOG_LEVEL=debug what a thousand clients write who connect and join at once.
	logBacklog = 4096

	// gcPercent is how much the heap may grow, in percent of what is live, before the collector runs
	// (Go's default: 100). Nearly all of it is idle connections' state, so half the head-room saves
	// a quarter of the memory and costs a broadcast no measurable time.
	gcPercent = 50
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)   // a second signal ends the process at once
	logging.Disable()              // go-redis's: what it would print is in the errors it returns
	signal.Ignore(syscall.SIGPIPE) // which a write to stderr raises when journald has died, and which ends a Go program
	if err := run(ctx, os.Getenv, os.Stderr); err != nil {
		output := newLogWriter(os.Stderr, slog.LevelInfo)
		fmt.Fprintln(output, "socketio:", err)
		output.flush() // not a plain write: a stderr that blocks holds up no restart
		os.Exit(1)
	}
}

// run serves until ctx is done, and then shuts down.
func run(ctx context.Context, getenv func(string) string, stderr io.Writer) error {
	cfg, err := loadConfig(getenv)
	if err != nil {
		return err
	}
	if getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(cfg.host, strconv.Itoa(cfg.port)))
	if err != nil {
		return err // "listen tcp 127.0.0.1:3001: bind: address already in use"
	}
	output := newLogWriter(stderr, cfg.logLevel)
	defer output.flush()
	handler := slog.NewTextHandler(output, &slog.HandlerOptions{Level: cfg.logLevel})
	s := newServer(cfg, slog.New(&throttledHandler{Handler: handler, last: make(map[string]time.Time)}))
	s.log.Info("listening", "addr", listener.Addr().String(), "version", version, "secured", len(cfg.secrets) > 0,
		"origins", strings.Join(cfg.origins, ","), "redis", cfg.redis != nil, "max_connections", cfg.maxConnections,
		"ping_interval", cfg.pingInterval, "ping_timeout", cfg.pingTimeout)
	if len(cfg.secrets) == 0 {
		s.log.Warn("open mode: anybody on this machine may join and broadcast; set SOCKETIO_SECRET before going public")
	}
	s.checkFileLimit()
	if cfg.redis != nil {
		s.cluster = newCluster(s, cfg.redis)
		connected, disconnect := context.WithCancel(context.Background())
		defer disconnect() // after shutdown: a broadcast under way has yet to come back from Redis
		go s.cluster.run(connected)
	}
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(acceptor{listener, s}) }()
	go s.supervise(ctx, listener.Addr().String(), getenv)
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
		s.shutdown()
		return nil
	}
}

// throttledHandler passes on a warning or an error at most once a second for each message, so that no
// client can flood the journal. Messages are fixed texts, hence each names one cause: up to its first number,
// since net/http's name ports and delays.
type throttledHandler struct {
	slog.Handler
	mu   sync.Mutex
	last map[string]time.Time
}

func (h *throttledHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		h.mu.Lock()
		defer h.mu.Unlock()
		cause := r.Message
		if i := strings.IndexAny(cause, "0123456789"); i >= 0 {
			cause = cause[:i]
		}
		if r.Time.Sub(h.last[cause]) < time.Second {
			return nil
		}
		h.last[cause] = r.Time
	}
	return h.Handler.Handle(ctx, r)
}

// logWriter hands lines to stderr in a goroutine of its own, so that nobody who logs, least of all a broadcast, waits
// for a journald that hangs. What finds the queue full, or stderr closed, is lost and counted.
type logWriter struct {
	lines chan []byte // nil: the end
	lost  atomic.Int64
	ended chan struct{}
}

func newLogWriter(stderr io.Writer, level slog.Level) *logWriter {
	w := &logWriter{lines: make(chan []byte, logBacklog), ended: make(chan struct{})}
	direct := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	go func() {
		defer close(w.ended)
		var told time.Time
		for line := <-w.lines; line != nil; line = <-w.lines {
			if _, err := stderr.Write(line); err != nil {
				w.lost.Add(1)
			} else if w.lost.Load() > 0 && time.Since(told) >= time.Second { // a stderr that is merely slow would lose lines to it
				direct.Warn("log lines lost: stderr was blocked or closed", "lines", w.lost.Swap(0))
				told = time.Now()
			}
		}
	}()
	return w
}

// Write never fails and never waits.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- bytes.Clone(line): // slog uses its buffer again
	default:
		w.lost.Add(1)
	}
	return len(line), nil
}

// flush writes what is queued, and ends the goroutine: within a quarter of closeTimeout, or not at all.
func (w *logWriter) flush() {
	go func() { w.lines <- nil }()
	select {
	case <-w.ended:
	case <-time.After(closeTimeout / 4):
	}
}

// Configuration

type config struct {
	host           string
	port           int
	secrets        []string       // the first signs and is expected; a second one is accepted too; none: open mode
	origins        []string       // as parseOrigin returns them; "*" among them: any
	redis          *redis.Options // nil: this daemon is alone
	maxConnections int
	pingInterval   time.Duration
	pingTimeout    time.Duration
	logLevel       slog.Level
}

const defaultOrigins = "http://localhost:8000,http://127.0.0.1:8000,http://localhost:5173,http://127.0.0.1:5173"

var hostname = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$`)

// loadConfig reads the environment. Its error names every variable that is wrong, and never quotes a secret.
func loadConfig(getenv func(string) string) (config, error) {
	var c config
	var errs []error
	get := func(name, fallback string) string { return cmp.Or(strings.TrimSpace(getenv(name)), fallback) }
	bad := func(name, value, want string) {
		errs = append(errs, fmt.Errorf("%s: %q is not %s", name, value, want))
	}
	number := func(name, fallback string, least, most int, want string) int {
		v := get(name, fallback)
		n, err := strconv.Atoi(v)
		if err != nil || n < least || n > most {
			bad(name, v, want)
		}
		return n
	}
	duration := func(name, fallback string) time.Duration {
		v := get(name, fallback)
		d, err := time.ParseDuration(v)
		if err != nil || d < 100*time.Millisecond || d > time.Hour {
			bad(name, v, "a duration from 100ms to 1h, such as "+fallback)
		}
		return d
	}

	c.host = get("SOCKET_HOST", "127.0.0.1")
	if _, err := netip.ParseAddr(c.host); err != nil && !hostname.MatchString(c.host) {
		bad("SOCKET_HOST", c.host, "an address to listen on, such as 127.0.0.1")
	}
	c.port = number("SOCKET_PORT", "3001", 0, 65535, "a port (0–65535)")
	c.maxConnections = number("MAX_CONNECTIONS", "10000", 1, 10_000_000, "a number of connections (1–10000000)")
	c.pingInterval = duration("PING_INTERVAL", "25s")
	c.pingTimeout = duration("PING_TIMEOUT", "20s")
	if v := get("SOCKETIO_SECRET", ""); v != "" {
		c.secrets = strings.Split(v, ",")
		if len(c.secrets) > 2 || slices.ContainsFunc(c.secrets, func(s string) bool {
			return len(s) < minSecret || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
		}) {
			errs = append(errs, errors.New("SOCKETIO_SECRET: want a secret of 32 or more printable ASCII characters without white space, or two of them as new,old; make one with openssl rand -hex 32"))
		}
	}
	for o := range strings.SplitSeq(get("CORS_ORIGINS", defaultOrigins), ",") {
		o = strings.TrimSpace(o)
		origin, want := parseOrigin(o)
		if want != "" {
			if i := strings.LastIndexByte(o, '@'); i >= 0 {
				o = "…" + o[i:] // in front of it may be a password
			}
			bad("CORS_ORIGINS", o, want)
		}
		c.origins = append(c.origins, origin)
	}
	if v := get("REDIS_URL", ""); v != "" {
		var err error
		if c.redis, err = redis.ParseURL(v); err != nil || !strings.HasPrefix(v, "redis://") && !strings.HasPrefix(v, "rediss://") {
			errs = append(errs, errors.New("REDIS_URL: want redis://[user:password@]host[:port][/database], or rediss:// for TLS")) // not quoted: it may hold a password
		}
	}
	level := get("LOG_LEVEL", "info")
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil || strings.ContainsAny(level, "+-") { // slog takes warn+1
		bad("LOG_LEVEL", level, "debug, info, warn or error")
	}
	return c, errors.Join(errs...)
}

// originHost is a name as browsers send it, also behind the *. of a wildcard. One that ends in a number they take
// for an IPv4 address.
var originHost = regexp.MustCompile(`^(\*\.)?([a-z0-9_-]+\.)*[a-z0-9_-]*[a-z_-][a-z0-9_-]*\.?$`)

// parseOrigin returns an origin as browsers send it (RFC 6454, section 6.2): scheme and host in lower case, without the
// scheme's default port. If no browser sends it, want says what to write instead.
func parseOrigin(s string) (origin, want string) {
	lower := strings.ToLower(s)
	u, err := url.Parse(lower)
	if err != nil {
		u = &url.URL{}
	}
	host := u.Hostname()
	addr, noAddr := netip.ParseAddr(host)
	if noAddr == nil {
		host = addr.String()
	}
	port := strings.TrimLeft(u.Port(), "0")
	_, noPort := strconv.ParseUint("0"+port, 10, 16)
	if port == map[string]string{"http": "80", "https": "443"}[u.Scheme] {
		port = ""
	}
	switch {
	case s == "*":
		origin = s
	case strings.ContainsFunc(s, func(r rune) bool { return r > '~' }):
		want = "what browsers send: write the name in its xn-- form, which location.origin shows in the page's console"
	case slices.Contains([]string{"file", "ftp", "ws", "wss"}, u.Scheme):
		want = "a page's origin: write http:// or https://, or the scheme of an app, such as capacitor://localhost"
	case lower == u.Scheme+"://"+u.Host && noPort == nil && (noAddr == nil || originHost.MatchString(host)):
		origin = u.Scheme + "://" + strings.TrimSuffix(net.JoinHostPort(host, port), ":")
	case strings.Contains(s, "*"):
		want = "an origin: * stands for any, or for all that is in front of a domain, as in https://*.example.com"
	default:
		want = "an origin (https://example.com, without a path) nor * for any"
	}
	return origin, want
}

// The server

type server struct {
	config
	log     *slog.Logger
	http    *http.Server
	sio     *socket.Server
	rooms   *rooms
	cluster *cluster // nil without Redis
	started time.Time

	sessions    sync.Map     // from an Engine.IO session's id to its *session
	connections atomic.Int64 // their number, and that of handshakes under way
	stopping    atomic.Bool
	waiting     atomic.Int64 // bytes that wait for clients, see maxWaiting
	shedding    sync.Mutex
	files       atomic.Int64 // open connections of any kind
	maxFiles    int64
	idle        evictionList // of connections without a request
	roomless    evictionList // of sessions in no room
	upgrader    websocket.Upgrader

	// Socket.IO keeps the request that it is given, which is 4 KB of headers a client. So all clients share this empty one.
	request *types.HttpContext

	broadcasts, dropped atomic.Int64 // since the start, for /health
}

func newServer(cfg config, log *slog.Logger) *server {
	s := &server{config: cfg, log: log, rooms: newRooms(), started: time.Now(), maxFiles: math.MaxInt64}
	s.upgrader = websocket.Upgrader{
		HandshakeTimeout: requestTimeout,
		ReadBufferSize:   256, // bytes: a client sends little
		WriteBufferPool:  new(sync.Pool),
		CheckOrigin:      func(*http.Request) bool { return true }, // see allowOrigin
		Error:            func(w http.ResponseWriter, _ *http.Request, _ int, _ error) { refuseEngine(w, 3, "Bad request") },
	}
	opts := socket.DefaultServerOptions()
	opts.SetConnectTimeout(connectTimeout)
	opts.SetAdapter(s.rooms)
	s.sio = socket.NewServer(nil, opts)
	_ = s.sio.On("connection", s.onConnection)
	s.request = types.NewHttpContext(struct{ http.ResponseWriter }{}, &http.Request{URL: &url.URL{}})
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ConnState:         s.onConnState,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// No ReadTimeout, no WriteTimeout: both would end a long poll that waits for its first message.
	}
	return s
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/socket.io/", s.handleSocketIO)
	mux.HandleFunc("POST /broadcast", s.handleBroadcast)
	mux.HandleFunc("GET /health", s.handleHealth)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		deadline := time.Now().Add(requestTimeout)
		if r.Body != http.NoBody {
			// For refused requests too: net/http waits for what their handlers leave of a body. Errors of
			// the deadline show up in the read itself.
			_ = control.SetReadDeadline(deadline)
			deadline = deadline.Add(publishTimeout + requestTimeout) // neither a slow body nor Redis takes of the answer's time
		}
		_ = control.SetWriteDeadline(deadline) // of the answer; a poll waits longer, and sets its own
		mux.ServeHTTP(w, r)
	})
}

// shutdown lets every client go in such a way that socket.io-client reconnects by itself, and nothing
// that /broadcast was answered 200 for is lost on the way: rooms.stop returns when the last fan-out is
// through, and each connection ends behind what was written to it. (With Redis, what comes back later misses this
// node's clients, as any node's messages do: they reconnect and fetch it.) It takes at most a quarter more than closeTimeout.
func (s *server) shutdown() {
	s.log.Info("stopping", "connections", s.connections.Load())
	s.stopping.Store(true)
	s.rooms.stop()
	for _, v := range s.sessions.Range {
		v.(*session).Close(false)
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout+closeTimeout/4)
	defer cancel()
	for s.connections.Load() > 0 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
	}
	s.log.Info("stopped", "connections", s.connections.Load())
}

// checkFileLimit fits the numbers of sessions and connections to the file limit, and warns if that takes some. Go's os
// package has raised the soft limit to the hard one already.
func (s *server) checkFileLimit() {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return
	}
	files := int(min(limit.Cur, 1<<30))
	if want := s.maxConnections + otherFiles; files < want {
		s.log.Warn("file limit too low for MAX_CONNECTIONS: raise LimitNOFILE= in socketio.service, or ulimit -n",
			"limit", files, "want", want)
		s.maxConnections = max(files-otherFiles, files/2)
	}
	s.maxFiles = int64(files - otherFiles/2)
}

// supervise tells systemd (sd_notify(3)) that the daemon serves, how many clients it has and, as long as its
// self-check passes, that it lives: at half of WatchdogSec=, so that one check may be late.
func (s *server) supervise(ctx context.Context, addr string, getenv func(string) string) {
	if getenv("NOTIFY_SOCKET") == "" {
		return
	}
	systemd := &net.UnixAddr{Name: getenv("NOTIFY_SOCKET"), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{}) // kept: there may be no file for another
	if err != nil {
		s.log.Error("systemd can't be told", "error", err)
		return
	}
	defer conn.Close()
	notify := func(state string) {
		if _, err := conn.WriteTo([]byte(state), systemd); err != nil {
			s.log.Warn("systemd can't be told", "error", err)
		}
	}
	interval := 15 * time.Second // of the status, where there is no watchdog
	if usec, err := strconv.Atoi(getenv("WATCHDOG_USEC")); err == nil && usec > 0 {
		interval = time.Duration(usec) * time.Microsecond / 2
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := s.selfCheck(ctx, addr); err != nil && !errors.Is(err, syscall.EMFILE) { // out of files is not hung
			s.log.Error("self-check failed", "error", err)
		} else {
			status := fmt.Sprintf("%d connections", s.connections.Load())
			if s.cluster != nil && !s.cluster.up.Load() {
				status += ", " + errNoRedis.Error()
			}
			notify("READY=1\nWATCHDOG=1\nSTATUS=" + status)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			notify("STOPPING=1")
			return
		}
	}
}

// selfCheck asks the listener for /health, whose counts take the lock that every broadcast takes.
func (s *server) selfCheck(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: addr, Path: "/health"}, Header: http.Header{}}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req.WithContext(ctx)) // past any HTTP_PROXY
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Socket.IO events

// The rooms. Channels are what Laravel calls them, see roomsOf.
const adminRoom socket.Room = "admin-room"

func sessionRoom(sessionID string) socket.Room { return socket.Room("session-" + sessionID) }

var validSessionID = regexp.MustCompile(`^[A-Za-z0-9_=@,.;-]{1,128}$`)

// parseSessionID returns the text of a session id: a string, or an integer that JavaScript holds exactly.
func parseSessionID(v any) (string, error) {
	var id string
	switch v := v.(type) {
	case string:
		id = v
	case float64:
		if n := int64(v); float64(n) == v && n > -1<<53 && n < 1<<53 {
			id = strconv.FormatInt(n, 10)
		}
	}
	if !validSessionID.MatchString(id) {
		return "", errors.New("sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;")
	}
	return id, nil
}

// onConnection runs when the library knows the client's socket. It acknowledges the CONNECT, see Write.
func (s *server) onConnection(args ...any) {
	client := args[0].(*socket.Socket)
	session := client.Conn().(*session)
	s.rooms.enter(client.Id(), session)
	client.OnAny(func(args ...any) { s.onEvent(client, args) })
	s.log.Debug("connected", "id", client.Id(), "addr", session.addr)
	*client.Handshake() = socket.Handshake{} // nothing reads it, and 16 KiB of JSON are up to 280 KB of it
	if old := session.socket.Swap(client); old != nil && old.Connected() {
		session.Close(false) // two CONNECTs at once, where v3.0.6 forgets the first's socket: a client could pile them up
	}
	session.send(newPacket(messagePacket, `0{"sid":%q}`, client.Id()))
	if session.ReadyState() != "open" {
		// It closed while it connected: v3.0.6 has then run its clean-up before there was anything to clean.
		s.rooms.DelAll(client.Id())
		client.Nsp().Remove(client)
	}
}

// onEvent handles one event of a client: its name, its arguments, and the acknowledgement if one is asked for.
func (s *server) onEvent(client *socket.Socket, args []any) {
	defer s.logPanic("event handler failed")
	ack, _ := args[len(args)-1].(socket.Ack)
	if ack != nil {
		args = args[:len(args)-1]
	}
	name, _ := args[0].(string)
	answer := map[string]string{
		"join-session": "joined-session", "leave-session": "left-session",
		"join-admin": "joined-admin", "leave-admin": "left-admin",
		"ping": "pong",
	}[name]
	reply := map[string]any{"timestamp": timestamp()}
	var err error
	switch answer {
	case "":
		s.log.Debug("unknown event", "id", client.Id(), "event", name)
		return
	case "pong":
	default:
		reply, err = s.onRoom(client, name, args[1:])
	}
	if err != nil {
		s.log.Debug("refused", "id", client.Id(), "event", name, "error", err)
		_ = client.Emit("error", map[string]any{"message": err.Error()})
		reply = map[string]any{"error": err.Error()}
	} else {
		_ = client.Emit(answer, reply)
	}
	if ack != nil {
		ack([]any{reply}, nil)
	}
}

// logPanic, deferred, logs a panic: an event handler's, which the library would print in colours, or a reader's,
// which would end the process.
func (s *server) logPanic(message string) {
	if err := recover(); err != nil {
		s.log.Error(message, "error", err, "stack", string(debug.Stack()))
	}
}

// onRoom handles the events that join and leave a room. A session's take an object; the admins' one, or nothing.
func (s *server) onRoom(client *socket.Socket, event string, args []any) (map[string]any, error) {
	var fields map[string]any
	isObject := true
	if len(args) > 0 && args[0] != nil {
		fields, isObject = args[0].(map[string]any)
	}
	room, channel, userType := adminRoom, "admin-chat", any("admin")
	reply := map[string]any{"room": adminRoom}
	if strings.HasSuffix(event, "-session") {
		if fields == nil {
			return nil, fmt.Errorf("%s wants an object {sessionId}", event)
		}
		id, err := parseSessionID(fields["sessionId"])
		if err != nil {
			return nil, err
		}
		room, channel, userType = sessionRoom(id), "chat-session."+id, fields["userType"]
		reply = map[string]any{"sessionId": fields["sessionId"], "roomName": room}
	}
	if strings.HasPrefix(event, "leave-") {
		s.rooms.leave(client.Id(), room)
		return reply, nil
	}
	if !isObject {
		return nil, errors.New("join-admin takes nothing, or an object {auth}")
	}
	if userType == nil {
		userType = "guest"
	}
	if userType != "guest" && userType != "admin" {
		return nil, errors.New(`userType has to be "guest" or "admin"`)
	}
	if err := s.verifyJoin(client, channel, fields["auth"]); err != nil {
		return nil, err
	}
	if !s.rooms.join(client.Id(), room) {
		return nil, fmt.Errorf("a connection may be in at most %d sessions: leave one first", maxRooms)
	}
	s.log.Debug("joined", "id", client.Id(), "room", room, "user_type", userType)
	return reply, nil
}

// verifyJoin checks Laravel's signature of this connection's id and the channel, in secured mode.
func (s *server) verifyJoin(client *socket.Socket, channel string, auth any) error {
	if len(s.secrets) == 0 {
		return nil
	}
	signature, ok := auth.(string)
	if !ok {
		return fmt.Errorf("auth is missing: ask Laravel's /broadcasting/auth to sign socket_id %s for channel %s", client.Id(), channel)
	}
	if !s.signed([]byte(signature), []byte(string(client.Id())+":"+channel)) {
		return fmt.Errorf("auth does not sign socket_id %s for channel %s: ask Laravel anew at each connect, and check that both sides have the same SOCKETIO_SECRET", client.Id(), channel)
	}
	return nil
}

// sign returns a text's signature by each secret: while it changes, a daemon with new,old understands those with either,
// and is understood by them.
func (s *server) sign(text ...[]byte) (signatures [][]byte) {
	for _, secret := range s.secrets {
		mac := hmac.New(sha256.New, []byte(secret))
		for _, part := range text {
			mac.Write(part)
		}
		signatures = append(signatures, hex.AppendEncode(nil, mac.Sum(nil)))
	}
	return signatures
}

// signed reports, in constant time, whether a signature is a text's by one of the secrets.
func (s *server) signed(signature []byte, text ...[]byte) bool {
	return slices.ContainsFunc(s.sign(text...), func(want []byte) bool { return hmac.Equal(want, signature) })
}

// HTTP handlers

// broadcastRequest is the body of POST /broadcast, checked. In JSON it is the header of a message between daemons.
type broadcastRequest struct {
	ID     string          `json:"id"` // of that message, made by publish
	Rooms  []socket.Room   `json:"rooms"`
	Except socket.SocketId `json:"except,omitempty"` // Laravel's toOthers(); empty: nobody
	Event  string          `json:"event"`
	data   []byte          // JSON, byte for byte as it came: Marshal would compact it and escape < and U+2028
}

// checkEvent says what is wrong with the event, whoever sent it. Its errors name the field.
func (b *broadcastRequest) checkEvent() error {
	if b.Event == "" || utf8.RuneCountInString(b.Event) > maxEvent {
		return fmt.Errorf("event has to be a string of 1 to %d characters", maxEvent)
	}
	if socket.SOCKET_RESERVED_EVENTS.Has(b.Event) {
		return fmt.Errorf("event %q is reserved by Socket.IO: choose another name", b.Event)
	}
	return nil
}

func (s *server) handleBroadcast(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, reason string) {
		respond(w, status, map[string]any{"success": false, "error": reason})
	}
	if r.Header.Get("Origin") != "" {
		refuse(http.StatusForbidden, "browsers may not broadcast: post to your Laravel application instead")
		return
	}
	if len(s.secrets) == 0 && !isLocal(r) {
		s.log.Warn("broadcast refused: not a local request, and SOCKETIO_SECRET is not set", "addr", clientAddr(r))
		refuse(http.StatusForbidden, openModeRefusal)
		return
	}
	if len(s.secrets) > 0 && !s.authorized(r.Header.Get("Authorization")) {
		s.log.Warn("broadcast refused: no or wrong bearer token", "addr", clientAddr(r))
		w.Header().Set("WWW-Authenticate", "Bearer")
		refuse(http.StatusUnauthorized, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has")
		return
	}
	body, status, err := readBody(w, r, maxBody)
	if err != nil {
		refuse(status, err.Error())
		return
	}
	b, err := parseBroadcast(body)
	if err != nil {
		refuse(http.StatusBadRequest, err.Error())
		return
	}
	answer := map[string]any{"success": true, "message": "Message broadcasted"}
	var delivered int
	if s.cluster == nil {
		var flush func() int
		if flush, err = s.rooms.broadcast(b); err == nil {
			delivered = flush()
		}
	} else {
		delivered, answer["nodes"], err = s.cluster.publish(b)
	}
	if err != nil {
		w.Header().Set("Retry-After", "1")
		refuse(http.StatusServiceUnavailable, err.Error())
		return
	}
	answer["delivered"] = delivered
	s.broadcasts.Add(1)
	s.log.Debug("broadcast", "rooms", b.Rooms, "delivered", delivered)
	respond(w, http.StatusOK, answer)
}

const openModeRefusal = "this server is in open mode and serves its own machine only: set SOCKETIO_SECRET here and in Laravel (a container, as of Sail or Docker, is another machine)"

// authorized compares hashes, so that the time tells nothing of a secret, nor of its length.
func (s *server) authorized(header string) bool {
	got := sha256.Sum256([]byte(header))
	return slices.ContainsFunc(s.secrets, func(secret string) bool {
		want := sha256.Sum256([]byte("Bearer " + secret))
		return hmac.Equal(got[:], want[:])
	})
}

// readBody reads what a request brings. Its error comes with the status to refuse the request with.
func readBody(w http.ResponseWriter, r *http.Request, most int64) (body []byte, status int, err error) {
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is over %d bytes", most)
	}
	if err != nil {
		return nil, http.StatusBadRequest, errors.New("the body did not arrive whole")
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // see routes
	return body, 0, nil
}

// parseBroadcast checks a body. Its errors are sentences that name the field.
func parseBroadcast(body []byte) (broadcastRequest, error) {
	var b broadcastRequest
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil || fields == nil || !utf8.Valid(body) {
		return b, errors.New("the body has to be one JSON object in UTF-8")
	}
	given := func(name string) bool { return len(fields[name]) > 0 && string(fields[name]) != "null" }

	channels := []string{""}
	switch {
	case given("channel") && given("channels"):
		return b, errors.New("give channel or channels, not both")
	case given("channels"):
		if json.Unmarshal(fields["channels"], &channels) != nil || len(channels) == 0 || len(channels) > maxChannels {
			return b, fmt.Errorf("channels has to be a list of 1 to %d channel names", maxChannels)
		}
	case !given("channel") || json.Unmarshal(fields["channel"], &channels[0]) != nil:
		return b, errors.New("channel has to be a string, such as chat-session.5 or admin-chat")
	}
	for _, channel := range channels {
		rooms, err := roomsOf(channel)
		if err != nil {
			return b, err
		}
		b.Rooms = append(b.Rooms, rooms...)
	}
	slices.Sort(b.Rooms)
	b.Rooms = slices.Compact(b.Rooms)

	if given("socket") && json.Unmarshal(fields["socket"], &b.Except) != nil {
		return b, errors.New("socket has to be a string: the Socket.IO id that is to be left out")
	}
	b.data = fields["data"]
	if b.data == nil {
		b.data = []byte("{}")
	}
	_ = json.Unmarshal(fields["event"], &b.Event) // what is no string leaves it empty
	return b, b.checkEvent()
}

// roomsOf returns the rooms of one of Laravel's channels.
func roomsOf(channel string) ([]socket.Room, error) {
	plain, private := strings.CutPrefix(channel, "private-")
	if !private {
		plain = strings.TrimPrefix(channel, "presence-")
	}
	if plain == "admin-chat" {
		return []socket.Room{adminRoom}, nil
	}
	if id, ok := strings.CutPrefix(plain, "chat-session."); ok {
		if _, err := parseSessionID(id); err != nil {
			return nil, fmt.Errorf("channel %q: %w", channel, err)
		}
		return []socket.Room{sessionRoom(id), adminRoom}, nil
	}
	return nil, fmt.Errorf("channel %q is unknown: use chat-session.{id} or admin-chat", channel)
}

func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) {
	sessions, admins := s.rooms.counts()
	memory := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(memory)
	health := map[string]any{
		"status":      "ok",
		"timestamp":   timestamp(),
		"connections": s.connections.Load(),
		"sessions":    sessions,
		"admins":      admins,
		"version":     version,
		"uptime":      int64(time.Since(s.started).Seconds()),
		"memory":      memory[0].Value.Uint64() - memory[1].Value.Uint64(),
		"broadcasts":  s.broadcasts.Load(),
		"deliveries":  s.rooms.deliveries.Load(),
		"dropped":     s.dropped.Load(),
	}
	code := http.StatusOK
	if s.cluster != nil {
		health["nodes"] = s.cluster.nodes.Load()
		if !s.cluster.up.Load() {
			code = http.StatusServiceUnavailable
			health["status"], health["reason"] = "degraded", errNoRedis.Error()
		}
	}
	if s.stopping.Load() {
		code = http.StatusServiceUnavailable
		health["status"] = "stopping"
	}
	if !isLocal(r) { // the rest would tell an attacker whether an admin is there, and how the attack goes
		health = map[string]any{"status": health["status"], "timestamp": health["timestamp"]}
	}
	respond(w, code, health)
}

func respond(w http.ResponseWriter, status int, body map[string]any) {
	b, _ := json.Marshal(body) // strings, numbers and booleans always encode
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func timestamp() string { return time.Now().UTC().Format("2006-01-02T15:04:05.000Z") }

// clientAddr returns the address of a request's client, for the log. What a proxy on this machine says
// of it counts; from anywhere else these headers are only a claim.
func clientAddr(r *http.Request) string {
	addr := peer(r)
	if addr.IsLoopback() {
		hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
		forwarded := cmp.Or(r.Header.Get("X-Real-IP"), strings.TrimSpace(hops[len(hops)-1]))
		if client, err := netip.ParseAddr(forwarded); err == nil {
			addr = client
		}
	}
	return addr.WithZone("").String() // a zone may be as long as a header, and each client keeps its address
}

// peer returns the address that a request's connection is from. There is one: the listener is TCP's.
func peer(r *http.Request) netip.Addr {
	remote, _ := netip.ParseAddrPort(r.RemoteAddr)
	return remote.Addr().Unmap()
}

// isLocal reports whether a request comes from this machine itself, and not through a proxy on it, which shows by what
// it adds, by nginx's HTTP/1.0, or by a Host that is not this machine's.
func isLocal(r *http.Request) bool {
	if !peer(r).IsLoopback() || r.Proto != "HTTP/1.1" {
		return false
	}
	for name := range r.Header {
		switch name {
		case "Forwarded", "Via", "X-Real-Ip", "Cf-Connecting-Ip", "True-Client-Ip":
			return false
		}
		if strings.HasPrefix(name, "X-Forwarded-") {
			return false
		}
	}
	return hasLoopbackHost(r) || strings.HasSuffix(requestHost(r), ".localhost")
}

// hasLoopbackHost reports whether Host names this machine in such a way that no DNS answer could make another name of it.
func hasLoopbackHost(r *http.Request) bool {
	addr, err := netip.ParseAddr(requestHost(r))
	return requestHost(r) == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

// requestHost returns Host in lower case, without its port and an IPv6 address' brackets.
func requestHost(r *http.Request) string { return strings.ToLower((&url.URL{Host: r.Host}).Hostname()) }

// handleSocketIO serves Engine.IO (protocol 4): handshakes, upgrades, polls and posts.
func (s *server) handleSocketIO(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	sid := query.Get("sid")
	if sid == "" && s.stopping.Load() { // a poll may still fetch what is on its way to it
		w.Header().Set("Retry-After", "1")
		http.Error(w, "the server is stopping", http.StatusServiceUnavailable)
		return
	}
	if len(s.secrets) == 0 && !isLocal(r) {
		s.log.Warn("connection refused: not a local request, and SOCKETIO_SECRET is not set", "addr", clientAddr(r))
		http.Error(w, openModeRefusal, http.StatusForbidden)
		return
	}
	if !s.allowOrigin(w, r) {
		return
	}
	if r.Method == http.MethodOptions { // a CORS preflight
		w.Header().Set("Access-Control-Allow-Methods", "GET, POST")
		w.Header().Set("Access-Control-Allow-Headers", r.Header.Get("Access-Control-Request-Headers"))
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if query.Has("j") {
		// A script tag sends no Origin, so that its answer could be read from any page.
		http.Error(w, "JSONP polling is not supported", http.StatusBadRequest)
		return
	}
	transport := query.Get("transport")
	polling, upgrade := transport == "polling", transport == "websocket" && websocket.IsWebSocketUpgrade(r)
	v, _ := s.sessions.Load(sid)
	session, _ := v.(*session)
	switch {
	case transport != "polling" && transport != "websocket":
		refuseEngine(w, 0, "Transport unknown")
	case sid == "" && r.Method != http.MethodGet:
		refuseEngine(w, 2, "Bad handshake method")
	case sid == "" && !polling && !upgrade:
		refuseEngine(w, 3, "Bad request")
	case sid == "" && query.Get("EIO") != "4":
		refuseEngine(w, 5, "Unsupported protocol version")
	case sid == "":
		s.handshake(w, r, polling)
	case session == nil || session.gone():
		refuseEngine(w, 1, "Session ID unknown")
	case upgrade:
		session.upgrade(w, r)
	case polling && r.Method == http.MethodGet && !session.upgraded():
		session.poll(w, r)
	case polling && r.Method == http.MethodPost && !session.upgraded():
		session.post(w, r)
	default:
		refuseEngine(w, 3, "Bad request")
	}
}

// allowOrigin answers a request from a page that may not connect, and lets the others' pages read the answer.
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) bool {
	origin := r.Header.Get("Origin")
	w.Header().Add("Vary", "Origin")
	switch {
	case origin == "" && r.Header.Get("Sec-Fetch-Site") == "cross-site":
		// An <img> on anybody's page would open sessions. Socket.IO's client sends Origin to another site, by each transport.
		http.Error(w, "pages of other sites connect with an Origin", http.StatusForbidden)
		return false
	case origin == "": // not a browser, or a poll of the server's own page
	case s.allows(origin, r):
		// Not a literal *, with which clients that set withCredentials (for a proxy's sticky cookie) fail. No cookie counts here.
		w.Header().Set("Access-Control-Allow-Origin", origin)
		w.Header().Set("Access-Control-Allow-Credentials", "true")
	default:
		s.log.Warn("origin refused: add it to CORS_ORIGINS if it is yours", "origin", fmt.Sprintf("%.100s", origin), "addr", clientAddr(r))
		http.Error(w, "this origin is not in CORS_ORIGINS", http.StatusForbidden)
		return false
	}
	return true
}

// allows reports whether CORS_ORIGINS has a request's origin, or it is the server's own: React Native and python-socketio
// send that, and so do pages of the same site.
func (s *server) allows(origin string, r *http.Request) bool {
	if slices.Contains(s.origins, "*") {
		return true
	}
	origin, want := parseOrigin(origin)
	if want != "" {
		return false
	}
	scheme, host, _ := strings.Cut(origin, "://")
	own, _ := parseOrigin(scheme + "://" + r.Host) // Host has no scheme, and so no default port
	// In open mode nothing else would stop a page whose name has been rebound to 127.0.0.1, which makes it the server's own.
	if own == origin && (len(s.secrets) > 0 || hasLoopbackHost(r)) {
		return true
	}
	return slices.ContainsFunc(s.origins, func(o string) bool {
		before, domain, wildcard := strings.Cut(o, "*") // https:// and .example.com
		return o == origin || wildcard && before == scheme+"://" && strings.HasSuffix(host, domain)
	})
}

// refuseEngine answers with one of Engine.IO's errors.
func refuseEngine(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprintf(w, `{"code":%d,"message":%q}`, code, message)
}

// handshake serves a request that opens an Engine.IO session.
func (s *server) handshake(w http.ResponseWriter, r *http.Request, polling bool) {
	if s.connections.Add(1) > int64(s.maxConnections) && !s.roomless.evictOldest(joinTimeout) {
		s.connections.Add(-1)
		s.log.Warn("connection refused: MAX_CONNECTIONS are open", "max_connections", s.maxConnections)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	session := &session{server: s, id: rand.Text(), addr: clientAddr(r)}
	session.changed.L = &session.mu
	if polling {
		session.open(`["websocket"]`)
		session.poll(w, r)
		return
	}
	wire, err := session.accept(w, r)
	if err != nil {
		s.connections.Add(-1)
		return
	}
	session.state, session.wire = onWebSocket, wire
	session.open(`[]`)
	go session.read(wire)
}

// Connections
//
// net/http and gorilla/websocket let anybody open connections without end, and send headers and frames in any number.
// So the listener's connections are of a type that counts.

const (
	maxFields  = 100      // header fields of a request: a browser behind proxies sends 30
	sendBuffer = 64 << 10 // bytes in the kernel, which doubles it: where it may grow by itself, a client that reads nothing takes 4 MB …
	readBuffer = 32 << 10 // … and so do requests that nobody reads, behind a poll that waits
	otherFiles = 64       // that are no client's: the listener, Redis, systemd, the log, and requests of Laravel
)

// acceptor is the listener. Past the file limit it closes who has waited longest without a request.
type acceptor struct {
	net.Listener
	server *server
}

func (a acceptor) Accept() (net.Conn, error) {
	for {
		accepted, err := a.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{TCPConn: accepted.(*net.TCPConn), server: a.server}
		c.evict = func() { c.Close() }
		_ = c.SetWriteBuffer(sendBuffer)
		_ = c.SetReadBuffer(readBuffer)
		if a.server.files.Add(1) <= a.server.maxFiles || a.server.idle.evictOldest(0) {
			return c, nil
		}
		c.Close()
	}
}

// onConnState is net/http's. It keeps the list of the idle, and has the lines of each request's header counted.
func (s *server) onConnState(c net.Conn, state http.ConnState) {
	connection := c.(*conn)
	if state == http.StateNew || state == http.StateIdle {
		s.idle.add(&connection.evictable)
		connection.header, connection.lines, connection.blank = true, 0, false
	} else {
		s.idle.remove(&connection.evictable)
	}
}

// evictionList holds those who have to go when a limit is met, the oldest first.
type evictionList struct {
	mu   sync.Mutex
	list list.List // of *evictable
}

type evictable struct {
	evict   func()
	since   time.Time     // it is in the list
	element *list.Element // nil: it is in none
}

// add puts one at the end of the list, also if it is there already.
func (l *evictionList) add(e *evictable) {
	l.remove(e)
	l.mu.Lock()
	defer l.mu.Unlock()
	e.since, e.element = time.Now(), l.list.PushBack(e)
}

func (l *evictionList) remove(e *evictable) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.element != nil {
		l.list.Remove(e.element)
		e.element = nil
	}
}

// evictOldest evicts the first of the list if it has been there for so long, and reports whether it did.
func (l *evictionList) evictOldest(age time.Duration) bool {
	l.mu.Lock()
	front := l.list.Front()
	if front == nil || time.Since(front.Value.(*evictable).since) < age {
		l.mu.Unlock()
		return false
	}
	oldest := l.list.Remove(front).(*evictable)
	oldest.element = nil
	l.mu.Unlock()
	oldest.evict()
	return true
}

// conn is a client's TCP connection, of HTTP at first. An upgrade makes it a WebSocket, which gorilla/websocket reads. That
// writes nothing but the handshake, and a last close frame to a client that breaks the protocol: the rest goes through the
// session's queue.
type conn struct {
	*net.TCPConn
	server    *server
	closed    sync.Once
	evictable // in server.idle

	// Of a request: whether its header is still to come, the lines of it so far, and whether the last one is empty so far.
	header bool
	lines  int
	blank  bool

	// Of a WebSocket.
	session  *session // whose it is; nil: it is none
	ws       *websocket.Conn
	raw      syscall.RawConn // to write to it
	bytes    int             // read of a message. There may be any number of empty frames, which gorilla/websocket does not show
	until    time.Time       // it has to carry the session by then; zero once it does
	answered bool            // it is a probe that works
}

func (c *conn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if c.header && !c.countLines(b[:n]) {
		io.WriteString(c.TCPConn, "HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
		return 0, io.EOF // which net/http does not answer
	}
	if c.bytes += n; c.session != nil && c.bytes > maxUnread {
		c.session.admit(messageBurst << 10)
		return 0, errTooFast
	}
	return n, err
}

// countLines counts the lines of a header up to the empty one that ends it, and reports whether there are not too many.
func (c *conn) countLines(b []byte) bool {
	for _, char := range b {
		switch {
		case char == '\n' && c.blank && c.lines > 0:
			c.header = false
			return c.lines <= 1+maxFields
		case char == '\n':
			c.lines++
			c.blank = true
		case char != '\r':
			c.blank = false
		}
	}
	return c.lines <= 1+maxFields // the first is the request's
}

func (c *conn) Close() error {
	c.closed.Do(func() { c.server.files.Add(-1) })
	return c.TCPConn.Close()
}

// Rooms and fan-out

// rooms is the one index of who is in which room, and the library's adapter for it. The library's own (v3.0.6) loses a
// member when a leave meets a join of the same room, and encodes a broadcast anew for each member.
//
// A broadcast has two steps. First its frame goes into the queue of every member, under one lock: so all members get all
// broadcasts in one order. Then each member is flushed. A room is flushed by one goroutine at a time, and what comes
// meanwhile waits for the next round: so in a busy room many frames leave in one system call, and a quiet one never waits.
type rooms struct {
	socket.Adapter // for what the library asks of an adapter and nothing here uses

	mu      sync.Mutex
	members map[socket.SocketId]*session
	rooms   map[socket.Room]*room // none is empty
	count   uint64                // of broadcasts so far
	stopped bool
	flushes sync.WaitGroup // broadcasts under way

	deliveries atomic.Int64 // since the start, for /health
}

type room struct {
	members  map[*session]struct{}
	pushed   uint64     // the last broadcast to it, by rooms.count
	flushing sync.Mutex // held while its members are flushed
	flushed  uint64     // up to this one they have been
}

var errStopped = errors.New("the server is stopping")

func newRooms() *rooms {
	return &rooms{Adapter: socket.MakeAdapter(), members: make(map[socket.SocketId]*session), rooms: make(map[socket.Room]*room)}
}

// New makes rooms its own constructor: there is one namespace, hence one adapter.
func (r *rooms) New(socket.Namespace) socket.Adapter { return r }

// enter makes a connection known: from now on it may join rooms, until DelAll.
func (r *rooms) enter(id socket.SocketId, s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[id] = s
}

// join puts a connection into a room, unless it is a session's and the connection is in maxRooms of them.
func (r *rooms) join(id socket.SocketId, name socket.Room) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.members[id]
	if m == nil || slices.Contains(m.rooms, name) { // gone, or in it already
		return true
	}
	sessions := len(m.rooms)
	if slices.Contains(m.rooms, adminRoom) {
		sessions--
	}
	if sessions >= maxRooms && name != adminRoom {
		return false
	}
	m.rooms = append(m.rooms, name)
	m.server.roomless.remove(&m.evictable)
	if r.rooms[name] == nil {
		r.rooms[name] = &room{members: make(map[*session]struct{})}
	}
	r.rooms[name].members[m] = struct{}{}
	return true
}

// AddAll is the library's join, of each socket to its private room: nothing here needs it.
func (r *rooms) AddAll(socket.SocketId, *types.Set[socket.Room]) {}

// leave takes a connection out of a room. What went into its queue before still leaves, ahead of the answer left-session.
func (r *rooms) leave(id socket.SocketId, name socket.Room) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.members[id]; m != nil {
		r.remove(m, name)
	}
}

// DelAll takes a connection out of all rooms. The library calls it when the connection has left the namespace: it may have
// left that alone, and keep its connection.
func (r *rooms) DelAll(id socket.SocketId) {
	r.mu.Lock()
	m := r.members[id]
	if m != nil {
		delete(r.members, id)
		for _, name := range slices.Clone(m.rooms) {
			r.remove(m, name)
		}
	}
	r.mu.Unlock()
	if m != nil {
		m.flush() // a round under way may have missed it
	}
}

func (r *rooms) remove(m *session, name socket.Room) {
	m.rooms = slices.DeleteFunc(m.rooms, func(joined socket.Room) bool { return joined == name })
	if len(m.rooms) == 0 {
		m.noteRoomless()
	}
	if room := r.rooms[name]; room != nil {
		if delete(room.members, m); len(room.members) == 0 {
			delete(r.rooms, name)
		}
	}
}

// counts returns the number of session rooms that somebody is in, and of sockets in the admins' room.
func (r *rooms) counts() (sessions, admins int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if room := r.rooms[adminRoom]; room != nil {
		return len(r.rooms) - 1, len(room.members)
	}
	return len(r.rooms), 0
}

// stop has every later broadcast refused, and returns when the last flush is through.
func (r *rooms) stop() {
	r.mu.Lock()
	r.stopped = true
	r.mu.Unlock()
	r.flushes.Wait()
}

// broadcast hands an event to the members of its rooms on this node, to each once. What it returns flushes them, has to be
// called once, and returns how many connections took it. It waits for system calls, but never for a client.
func (r *rooms) broadcast(b broadcastRequest) (flush func() (delivered int), err error) {
	f := newEvent(b.Event, b.data)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return nil, errStopped
	}
	r.flushes.Add(1)
	r.count++
	delivered := 0
	n := r.count
	if m := r.members[b.Except]; m != nil {
		m.last = n // as if it had it
	}
	var pushed []*room
	for _, name := range b.Rooms {
		room := r.rooms[name]
		if room == nil {
			continue
		}
		for m := range room.members {
			if m.last != n {
				m.last = n
				if m.push(f) {
					delivered++
				}
			}
		}
		room.pushed = n
		pushed = append(pushed, room)
	}
	return func() int {
		defer r.flushes.Done()
		for _, room := range pushed {
			r.flush(room, n)
		}
		delivered -= int(f.lost.Load())
		r.deliveries.Add(int64(delivered))
		return delivered
	}, nil
}

// flush returns when the members of a room have been flushed since broadcast n went into their queues.
func (r *rooms) flush(room *room, n uint64) {
	room.flushing.Lock()
	defer room.flushing.Unlock()
	if room.flushed >= n {
		return // the round before had it, too
	}
	r.mu.Lock()
	room.flushed = room.pushed
	members := slices.AppendSeq(make([]*session, 0, len(room.members)), maps.Keys(room.members))
	r.mu.Unlock()
	flushAll(members)
}

// frame is a message on its way: made once, and shared by all queues that it is in.
type frame struct {
	bytes   []byte       // as an unmasked WebSocket frame (RFC 6455, section 5.2)
	text    []byte       // its payload, an Engine.IO packet: what a poll gets
	made    time.Time    // hence how long it has waited
	answer  bool         // to a message of the one client that it goes to
	holders atomic.Int32 // queues that it is in
	lost    atomic.Int32 // sessions that ended with it still in their queue
}

// cost is how many bytes a waiting frame takes, with 128 for what holds it.
func (f *frame) cost() int { return len(f.bytes) + 128 }

func newFrame(opcode byte, text []byte) *frame {
	header := []byte{0x80 | opcode}
	switch size := len(text); {
	case size < 126:
		header = append(header, byte(size))
	case size < 1<<16:
		header = binary.BigEndian.AppendUint16(append(header, 126), uint16(size))
	default:
		header = binary.BigEndian.AppendUint64(append(header, 127), uint64(size))
	}
	b := slices.Concat(header, text)
	return &frame{bytes: b, text: b[len(header):], made: time.Now()}
}

// newPacket returns an Engine.IO packet as a frame.
func newPacket(kind byte, format string, args ...any) *frame {
	return newFrame(websocket.TextMessage, fmt.Appendf([]byte{kind}, format, args...))
}

// newEvent returns a Socket.IO event ("2") in an Engine.IO message. The JSON goes in as it is.
func newEvent(name string, data []byte) *frame {
	quoted, _ := json.Marshal(name) // a string always encodes
	return newPacket(messagePacket, "2[%s,%s]", quoted, data)
}

// Several daemons
//
// All daemons on one Redis subscribe to one channel, and a broadcast to any of them is published there and nowhere
// else. Its own daemon, too, delivers it when it comes back: hence the members on all nodes see the messages in one
// order, Redis's, and a message that Redis did not take is delivered to nobody.
//
// Anybody who can reach Redis can publish there. So a message is signed, and checked as a stranger's:
//
//	hex(HMAC-SHA256(secret, messagePrefix + all that follows this line)), by each secret, with a comma between
//	{"id", "rooms", "except", "event"}
//	the data, byte for byte
//
// In open mode the first line is empty.

const (
	// A retry must not double a message. But Redis may still execute a PUBLISH that it has not answered, after Laravel was
	// told 503. Then no node may be listening any more. Hence the order, counted from the moment Redis hangs:
	//
	//	1.75 s  each node gives up its subscription, which has been silent for redisSilence
	//	2.1 s   the daemon gives up its PUBLISH, publishAnswer after it was sent
	//	2.5 s   and answers 503 at the latest: what publishConnect and publishWrite don't suffice for is never sent
	//
	// The 350 ms between are for a node that is behind with delivering, and for go-redis's deadlines, which come up to 50 ms early.
	redisSilence   = 1750 * time.Millisecond
	publishConnect = 200 * time.Millisecond // for a connection, from the pool or a new one
	publishWrite   = 150 * time.Millisecond
	publishAnswer  = 2100 * time.Millisecond
	publishTimeout = 2500 * time.Millisecond // for all of it: below the 3 s that the README's broadcaster waits

	redisRetry      = time.Second     // at most, between two attempts to subscribe
	refreshSpread   = 5 * time.Second // over which clients reconnect when their node may have missed something
	refreshInterval = time.Minute     // at least, from one to the next: Redis drops a node that is too slow again and again

	// messagePrefix is signed with each message. Its space keeps it apart from what a join signs, socketId:channel.
	messagePrefix = "socketio redis 1\n"
	maxPublished  = 8 * maxBody // bytes: JSON makes six of a control character
)

type cluster struct {
	server    *server
	redis     *redis.Client
	channel   string
	up        atomic.Bool
	nodes     atomic.Int64  // subscribers of the channel
	waiting   sync.Map      // from the ID of a message on its way to the chan int that takes receive's result
	flushing  chan struct{} // a place for each message whose members are being flushed
	refreshAt time.Time     // of the last refresh, or of the one to come; run's
}

var errNoRedis = errors.New("Redis is out of reach")

func newCluster(s *server, options *redis.Options) *cluster {
	options.Protocol = 2 // nothing here needs RESP 3
	options.DisableIdentity = true
	options.MaxRetries = -1 // a PUBLISH that is sent again could arrive twice
	options.DialerRetries = 1
	// No ContextTimeoutEnabled: a context then limits the wait for a connection, and not the answer.
	options.DialTimeout, options.WriteTimeout, options.ReadTimeout = redisSilence, publishWrite, publishAnswer
	// go-redis looks at no context while it greets a new Redis.
	options.OnConnect = func(ctx context.Context, _ *redis.Conn) error { return ctx.Err() }
	return &cluster{server: s, redis: redis.NewClient(options), flushing: make(chan struct{}, 32), channel: fmt.Sprintf("socketio:%d", options.DB)}
}

// run keeps the subscription until ctx is done.
func (c *cluster) run(ctx context.Context) {
	defer c.redis.Close()
	for retry := time.Duration(0); ; retry = min(2*retry, redisRetry) {
		first := retry == 0
		err := c.subscribe(ctx, !first)
		if ctx.Err() != nil {
			return
		}
		c.nodes.Store(0)
		if c.up.Swap(false) || first {
			retry = redisRetry / 16
			c.server.log.Warn("redis out of reach: broadcasts are refused until it is back", "addr", c.redis.Options().Addr, "error", err)
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
	}
}

// subscribe delivers what is published, until the subscription is lost. If there was none for a while, messages of other
// nodes may have been missed: so all clients reconnect, and their pages fetch from Laravel what they don't have.
func (c *cluster) subscribe(ctx context.Context, lost bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer c.server.logPanic("redis subscription panicked") // go-redis's: an answer of types that it does not expect
	subscription := c.redis.Subscribe(ctx, c.channel)
	defer subscription.Close()
	if _, err := subscription.ReceiveTimeout(ctx, redisSilence); err != nil { // Redis's answer to SUBSCRIBE
		return err
	}
	c.server.log.Info("redis reached", "addr", c.redis.Options().Addr, "channel", c.channel)
	if lost {
		c.refresh()
	}
	c.up.Store(true)
	go c.repeat(ctx, func() { _ = subscription.Ping(ctx) }) // so that a Redis that lives is never silent
	go c.repeat(ctx, func() {                               // not in the same goroutine: a late answer must not delay a ping
		if n, err := c.redis.PubSubNumSub(ctx, c.channel).Result(); err == nil && ctx.Err() == nil {
			c.nodes.Store(n[c.channel])
		}
	})
	for {
		received, err := subscription.ReceiveTimeout(ctx, redisSilence)
		if err != nil {
			return err
		}
		switch received := received.(type) {
		case *redis.Message:
			c.receive(received.Payload)
		case *redis.Subscription: // go-redis subscribes anew by itself where a Ping fails: the same loss
			return errors.New("the connection was lost")
		}
	}
}

// refresh has all clients reconnect: at once, or, after a recent refresh, refreshInterval later than that. A refresh that is
// still to come serves for this loss, too.
func (c *cluster) refresh() {
	now := time.Now()
	if c.refreshAt.After(now) || c.server.connections.Load() == 0 {
		return
	}
	if c.refreshAt = c.refreshAt.Add(refreshInterval); c.refreshAt.Before(now) {
		c.refreshAt = now
	}
	time.AfterFunc(c.refreshAt.Sub(now), func() {
		for _, v := range c.server.sessions.Range {
			time.AfterFunc(mathrand.N(refreshSpread), func() { v.(*session).Close(false) })
		}
	})
}

// repeat calls f every quarter of redisSilence, until ctx is done.
func (c *cluster) repeat(ctx context.Context, f func()) {
	tick := time.NewTicker(redisSilence / 4)
	defer tick.Stop()
	for ctx.Err() == nil {
		func() {
			defer c.server.logPanic("redis request panicked")
			f()
		}()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// receive delivers a message, whoever published it.
func (c *cluster) receive(payload string) {
	defer c.server.logPanic("redis message panicked")
	m, err := c.open(payload)
	if err != nil {
		c.server.log.Warn("redis message ignored: not from a daemon with this SOCKETIO_SECRET and version",
			"channel", c.channel, "error", err)
		return
	}
	c.flushing <- struct{}{}
	flush, err := c.server.rooms.broadcast(m) // here, for Redis's order
	go func() {                               // and this by itself: so a busy room's messages leave together
		defer func() { <-c.flushing }()
		defer c.server.logPanic("redis message panicked")
		delivered := 0
		if err == nil {
			delivered = flush()
		}
		if result, ok := c.waiting.LoadAndDelete(m.ID); ok { // this node's own
			result.(chan int) <- delivered
		}
	}()
}

// open checks a message's signature, and then whether /broadcast could have sent it. Its errors quote none of it.
func (c *cluster) open(payload string) (m broadcastRequest, err error) {
	if len(payload) > maxPublished {
		return m, fmt.Errorf("it is over %d bytes", maxPublished)
	}
	signatures, message, _ := bytes.Cut([]byte(payload), []byte("\n"))
	if !c.signed(signatures, message) {
		return m, errors.New("its signature is missing or wrong")
	}
	header, data, _ := bytes.Cut(message, []byte("\n"))
	if json.Unmarshal(header, &m) != nil || !utf8.Valid(header) || len(m.Rooms) == 0 || len(m.Rooms) > maxChannels+1 {
		return m, errors.New("its header is none")
	}
	for _, room := range m.Rooms {
		id, ok := strings.CutPrefix(string(room), string(sessionRoom("")))
		if room != adminRoom && (!ok || !validSessionID.MatchString(id)) {
			return m, errors.New("a room is no channel's")
		}
	}
	// Invalid UTF-8 in a text frame would close every member's WebSocket.
	if m.data = data; len(data) > maxBody || !utf8.Valid(data) || !json.Valid(data) {
		return m, fmt.Errorf("data has to be JSON in UTF-8, of at most %d bytes", maxBody)
	}
	return m, m.checkEvent()
}

// signed reports whether one of the secrets has signed the message; in open mode, whether none has.
func (c *cluster) signed(signatures, message []byte) bool {
	if len(c.server.secrets) == 0 {
		return len(signatures) == 0
	}
	first, second, _ := bytes.Cut(signatures, []byte(","))
	prefix := []byte(messagePrefix)
	return c.server.signed(first, prefix, message) || c.server.signed(second, prefix, message)
}

// publish sends an event to all nodes, and returns how many connections of this one took it, and how many nodes got it.
// It takes publishTimeout at most.
func (c *cluster) publish(b broadcastRequest) (delivered int, nodes int64, err error) {
	if c.server.stopping.Load() {
		return 0, 0, errStopped
	}
	if !c.up.Load() {
		return 0, 0, errNoRedis
	}
	b.ID = rand.Text()
	header, _ := json.Marshal(b) // strings always encode
	message := slices.Concat(header, []byte("\n"), b.data)
	payload := slices.Concat(bytes.Join(c.server.sign([]byte(messagePrefix), message), []byte(",")), []byte("\n"), message)
	result := make(chan int, 1)
	c.waiting.Store(b.ID, result)
	defer c.waiting.Delete(b.ID)
	timeout := time.After(publishTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), publishConnect)
	defer cancel()
	answer := make(chan *redis.IntCmd, 1)
	go func() { // by itself: a greeting of Redis may take longer than publishTimeout, but nothing is sent after it
		defer c.server.logPanic("publish panicked")
		answer <- c.redis.Publish(ctx, c.channel, payload)
	}()
	select {
	case command := <-answer:
		nodes, err = command.Result()
	case <-timeout:
		err = os.ErrDeadlineExceeded
	}
	if err != nil {
		c.server.log.Warn("publish failed", "error", err)
		return 0, 0, errNoRedis
	}
	select {
	case delivered = <-result:
	case <-timeout: // the subscription was lost meanwhile; the other nodes have the message
		select {
		case delivered = <-result: // came at the same time
		default:
		}
	}
	return delivered, nodes, nil
}

// Engine.IO sessions
//
// The library's Engine.IO server (v3.0.6) queues without bound for a client that does not read, takes a quick PONG for a
// missing one, and costs 9 KB more heap a client. Its Socket.IO part needs nothing of it but the methods of an
// engine.Socket that begin this section: so the sessions are our own.

// session is one client's Engine.IO session. All that goes to the client waits in its one queue: polls fetch it, or the
// WebSocket's writer sends it. An upgrade changes who empties the queue, and moves nothing.
type session struct {
	engine.Socket // nil: what Socket.IO does not ask for
	server        *server
	id            string // a secret of the client's: who has it can poll
	addr          string

	onData, onClose types.EventListener           // Socket.IO's
	closing         sync.Once                     // calls onClose
	socket          atomic.Pointer[socket.Socket] // the last that connected to the namespace, or nil; it may have left

	rooms []socket.Room // that its socket is in; this and last are under rooms.mu
	last  uint64        // the last broadcast that went into its queue: who is in several of the rooms gets it once

	receiving   sync.Mutex  // held while a packet is handled: one at a time, whether a POST or the wire brings it
	paid        time.Time   // the time by which messageRate allows all that came so far, see admit
	attachments int         // of the last binary event, still to come
	posting     atomic.Bool // a POST is under way

	mu      sync.Mutex
	changed sync.Cond // of mu: what a poll waits for may have come
	state   state
	wire    *conn    // the WebSocket that carries the session; nil: its polls do
	probe   *conn    // the WebSocket that is tried, while polls carry the session
	queue   []*frame // what waits, the oldest first
	size    int      // bytes of it, by cost
	answers int      // bytes of these that answer the client's own messages
	sent    int      // bytes of its first frame that the WebSocket has taken
	writing bool     // the front of the queue is on its way: somebody writes it to the wire, or in a poll's answer
	polled  bool     // there is a poll: it waits, or its answer is leaving

	evictable // in server.roomless

	heart    *time.Timer // calls beat at deadline
	deadline time.Time   // for the client's PONG if one is due, else of the next PING
	ping     *frame      // the PING whose PONG is due; nil: none
	pinged   bool        // it has left, so that a PONG can answer it
}

// state says what a session does with its queue.
//
//	polling ⇄ probing → onWebSocket     the client opens a WebSocket, which fails, or on which it sends UPGRADE
//	polling, probing, onWebSocket → ending → closed
//	any → closed
type state int

const (
	polling     state = iota // polls fetch it
	probing                  // the same, while a WebSocket is tried
	onWebSocket              // the wire takes it
	ending                   // takes nothing more: what waits leaves the way it would have, and a last packet behind it
	closed                   // there is none
)

// become changes the state, and reports whether that is legal. It is called with the lock.
func (s *session) become(to state) bool {
	legal := s.state == polling && to == probing ||
		s.state == probing && (to == polling || to == onWebSocket) ||
		s.state < to && to >= ending
	if legal {
		s.state = to
	}
	return legal
}

func (s *session) Id() string                                               { return s.id }
func (s *session) Protocol() int                                            { return 4 }
func (s *session) Request() *types.HttpContext                              { return s.server.request }
func (s *session) RemoteAddress() string                                    { return s.addr }
func (s *session) RemoveListener(types.EventName, types.EventListener) bool { return false }

func (s *session) ReadyState() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state >= ending {
		return "closed"
	}
	return "open"
}

func (s *session) On(event types.EventName, listeners ...types.EventListener) error {
	switch event {
	case "data":
		s.onData = listeners[0]
	case "close":
		s.onClose = listeners[0]
	}
	return nil
}

func (s *session) Once(event types.EventName, listeners ...types.EventListener) error {
	return s.On(event, listeners...)
}

// Write sends a packet of Socket.IO's, but for the acknowledgement of a CONNECT: v3.0.6 writes it before it knows the
// socket, and closes the connection of a client that answers at once with an event. So onConnection sends it.
func (s *session) Write(data io.Reader, _ *packet.Options, _ engine.SendCallback) engine.Socket {
	if text := data.(types.BufferInterface).Bytes(); !bytes.HasPrefix(text, []byte("0{")) {
		s.send(newPacket(messagePacket, "%s", text))
	}
	return s
}

// Close ends the session from this side.
func (s *session) Close(bool) { s.end(closePacket, closeTimeout) }

// open begins the session: Socket.IO listens, then the client is told.
func (s *session) open(upgrades string) {
	socket.NewClient(s.server.sio, s)
	s.mu.Lock()
	s.deadline = time.Now().Add(s.server.pingInterval)
	s.heart = time.AfterFunc(s.server.pingInterval, s.beat)
	s.mu.Unlock()
	s.server.sessions.Store(s.id, s)
	s.evict = s.abort
	s.noteRoomless()
	s.send(newPacket(openPacket, `{"maxPayload":%d,"pingInterval":%d,"pingTimeout":%d,"sid":%q,"upgrades":%s}`,
		maxMessage, s.server.pingInterval.Milliseconds(), s.server.pingTimeout.Milliseconds(), s.id, upgrades))
	if s.server.stopping.Load() { // since the request came
		s.Close(false)
	}
}

// noteRoomless notes that the session is in no room, unless it has closed.
func (s *session) noteRoomless() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != closed {
		s.server.roomless.add(&s.evictable)
	}
}

// beat sends a PING, or ends the session of a client that has not answered the last one.
func (s *session) beat() {
	s.mu.Lock()
	silent := s.ping != nil
	if s.state < ending && !silent {
		s.ping = newPacket(pingPacket, "")
		s.enqueue(s.ping)
		s.deadline = s.deadline.Add(s.server.pingTimeout)
		s.heart.Reset(time.Until(s.deadline))
	}
	s.mu.Unlock()
	if silent {
		s.abort()
	} else {
		s.flush()
	}
}

// gone reports whether the session has closed, or will within 10 ms because a PONG is overdue: the client measures the same
// time-out, and may be ahead.
func (s *session) gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == closed || s.ping != nil && time.Until(s.deadline) < min(s.server.pingTimeout/20, 10*time.Millisecond)
}

const (
	// maxBacklog is how many bytes may wait for a client before one frame more has it cut off: two of the largest
	// broadcasts, so that three may come at once, or ten thousand chat lines.
	maxBacklog = 2*maxBody + 1<<10
	// maxAnswers is how many bytes of them may answer the client's own messages. An admin who comes back by polling gets 101 of up
	// to 350 bytes, and as many acknowledgements, before its next poll. Who does not read them must not get more.
	maxAnswers = 128 << 10
	// maxWaiting is how many bytes may wait for all clients, a shared frame counted once. Past it those are cut off who
	// have read nothing for the longest.
	maxWaiting = 64 << 20
)

// push puts a frame into the queue, and reports whether it is on its way, which flush sees to. It never blocks.
func (s *session) push(f *frame) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.state >= ending:
		return false
	case s.size >= maxBacklog, s.answers >= maxAnswers:
		s.become(ending)
		go s.cutOff("it does not read what waits for it") // not here: it takes the lock that a broadcast holds
		return false
	}
	s.enqueue(f)
	return true
}

func (s *session) enqueue(f *frame) {
	s.queue = append(s.queue, f)
	s.size += f.cost()
	if f.answer {
		s.answers += f.cost()
	}
	if f.holders.Add(1) == 1 && s.server.waiting.Add(int64(f.cost())) > maxWaiting {
		go s.server.shed()
	}
}

// release takes the first frames out of the queue.
func (s *session) release(n int) {
	for _, f := range s.queue[:n] {
		s.size -= f.cost()
		if f.answer {
			s.answers -= f.cost()
		}
		if f.holders.Add(-1) == 0 {
			s.server.waiting.Add(int64(-f.cost()))
		}
	}
	if s.queue = slices.Delete(s.queue, 0, n); len(s.queue) == 0 && cap(s.queue) > 16 {
		s.queue = nil // a small array is kept for the next frames
	}
}

// send pushes what answers the client itself, and flushes.
func (s *session) send(f *frame) {
	f.answer = true
	if s.push(f) {
		s.flush()
	}
}

// flush has what waits leave, unless somebody sees to it already: a poll is answered with it, or it is written to the
// wire, as far as that takes it at once.
func (s *session) flush() { flushAll([]*session{s}) }

// took removes bytes that have left from the front of the queue.
func (s *session) took(n int) {
	s.sent += n
	whole := 0
	for whole < len(s.queue) && s.sent >= len(s.queue[whole].bytes) {
		s.sent -= len(s.queue[whole].bytes)
		whole++
	}
	s.release(whole)
}

// end refuses what comes from here on, and ends the session behind what is on its way. Whatever has not left after the
// wait is lost.
func (s *session) end(last byte, wait time.Duration) {
	s.mu.Lock()
	if !s.become(ending) {
		s.mu.Unlock()
		return
	}
	if s.wire != nil {
		s.enqueue(goingAway())
	} else {
		s.enqueue(newPacket(last, ""))
	}
	s.mu.Unlock()
	s.flush()
	time.AfterFunc(wait, s.abort)
	s.closing.Do(func() { s.onClose("server close") })
}

// abort ends the session at once and gives its place back. Whatever has not left is lost.
func (s *session) abort() {
	s.mu.Lock()
	if !s.become(closed) {
		s.mu.Unlock()
		return
	}
	if !s.writing { // else the front of the queue may have arrived, and counts as delivered
		s.lose()
	}
	s.release(len(s.queue)) // now: shed counts on it
	s.queue = nil
	s.heart.Stop()
	s.changed.Broadcast()
	for _, w := range []*conn{s.wire, s.probe} {
		if w != nil {
			w.Close()
		}
	}
	s.mu.Unlock()
	s.server.sessions.Delete(s.id)
	s.server.connections.Add(-1)
	s.closing.Do(func() { s.onClose("transport close") })
	s.server.roomless.remove(&s.evictable)
}

// lose notes that nothing of what waits will arrive.
func (s *session) lose() {
	for _, f := range s.queue {
		f.lost.Add(1)
	}
}

// cutOff ends the session of a client that does not read. What the kernel holds for it goes too.
func (s *session) cutOff(why string) {
	s.mu.Lock()
	gone := s.state == closed
	if s.wire != nil {
		_ = s.wire.SetLinger(0)
	}
	s.mu.Unlock()
	if !gone {
		s.server.dropped.Add(1)
		s.server.log.Warn("client cut off", "why", why, "addr", s.addr)
		s.abort()
	}
}

// shed cuts off those clients who have read nothing for the longest, until a quarter of maxWaiting is free.
func (s *server) shed() {
	if !s.shedding.TryLock() {
		return
	}
	defer s.shedding.Unlock()
	since := map[*session]time.Time{}
	for _, v := range s.sessions.Range {
		session := v.(*session)
		session.mu.Lock()
		if len(session.queue) > 0 {
			since[session] = session.queue[0].made
		}
		session.mu.Unlock()
	}
	longest := func(a, b *session) int { return since[a].Compare(since[b]) }
	for _, session := range slices.SortedFunc(maps.Keys(since), longest) {
		if s.waiting.Load() < maxWaiting*3/4 {
			return
		}
		session.cutOff("too much waits for all clients, and it has read nothing for the longest")
	}
}

const (
	maxMessage     = 16 << 10     // bytes of a client's message: it only joins, leaves and pings; told it as maxPayload
	maxBrackets    = 256          // [ and { in a message: a join has two; 16 KiB of them would be a megabyte, decoded
	maxAttachments = 10           // of one binary event: the library's limit
	messageRate    = 5            // a client's messages a second, in the long run; see admit for what counts as one …
	messageBurst   = 8 + maxRooms // … and at once: a page comes back with an upgrade's two, CONNECT, join-admin and maxRooms joins; 4 to spare
)

// admit reports whether the client keeps to messageRate with one more packet, or WebSocket frame of any kind, of so many
// bytes: each KiB counts as one more, as 16 KiB can be half a millisecond of work. If not, it is told so and cut off.
func (s *session) admit(size int) bool {
	s.receiving.Lock()
	defer s.receiving.Unlock()
	const cost = time.Second / messageRate
	if earliest := time.Now().Add(-messageBurst * cost); s.paid.Before(earliest) { // what it can save up
		s.paid = earliest
	}
	s.paid = s.paid.Add(time.Duration(1+size>>10) * cost)
	if time.Until(s.paid) <= 0 {
		return true
	}
	s.server.log.Debug("cut off: too many messages", "addr", s.addr)
	s.send(newEvent("error", fmt.Appendf(nil, `{"message":"too many messages: at most %d a second"}`, messageRate)))
	s.Close(false)
	return false
}

// Engine.IO's packet types (protocol 4) that are asked for or told here.
const (
	openPacket    = '0'
	closePacket   = '1'
	pingPacket    = '2'
	pongPacket    = '3'
	messagePacket = '4'
	upgradePacket = '5'
	noopPacket    = '6'
	binaryPacket  = 'b' // a message: base64 in polling, a binary frame on a WebSocket
)

// decodePacket takes a packet's text apart. Nobody reads what a binary message holds.
func decodePacket(packet []byte) (kind byte, text []byte, err error) {
	switch {
	case len(packet) > 0 && packet[0] == binaryPacket:
		_, err = base64.StdEncoding.DecodeString(string(packet[1:]))
		return binaryPacket, nil, err
	case len(packet) > 0 && openPacket <= packet[0] && packet[0] <= noopPacket:
		return packet[0], packet[1:], nil
	}
	return 0, nil, errors.New("invalid packet")
}

// onPacket handles a client's packet, which admit has let in.
func (s *session) onPacket(kind byte, text []byte) {
	s.receiving.Lock()
	defer s.receiving.Unlock()
	switch {
	case s.ReadyState() != "open":
	case kind == pongPacket:
		s.mu.Lock()
		if s.pinged && s.state < ending {
			s.ping, s.pinged = nil, false
			s.deadline = time.Now().Add(s.server.pingInterval)
			s.heart.Reset(s.server.pingInterval)
		}
		s.mu.Unlock()
	case kind == pingPacket: // the server's part since protocol 4
		s.abort()
	case kind == binaryPacket && s.attachments > 0:
		s.attachments--
	case kind == binaryPacket, kind == messagePacket && s.attachments > 0:
		s.Close(false) // Socket.IO's parser takes the attachments that it was told of, and nothing between them
	case kind == messagePacket:
		s.onMessage(text)
	}
}

// onMessage hands a packet of Socket.IO's to the library, as far as v3.0.6 can take it.
func (s *session) onMessage(text []byte) {
	if bytes.Count(text, []byte("["))+bytes.Count(text, []byte("{")) > maxBrackets {
		s.send(newEvent("error", fmt.Appendf(nil, `{"message":"a message may have at most %d brackets"}`, maxBrackets)))
		return
	}
	client := s.socket.Load()
	switch {
	case string(text) == "1" && client != nil && client.Connected(): // DISCONNECT
		// The namespace is left later than this returns, and a client that connects to it anew at once is
		// closed: so this waits.
		left := make(chan struct{})
		_ = client.Once("disconnect", func(...any) { close(left) })
		s.onData(types.NewStringBuffer(text))
		select {
		case <-left:
		case <-time.After(closeTimeout): // the connection closed at the same time
		}
	case bytes.HasPrefix(text, []byte("5")), bytes.HasPrefix(text, []byte("6")):
		s.onBinary(text)
	default:
		s.onData(types.NewStringBuffer(text))
	}
}

// onBinary handles an event ("5") or an acknowledgement ("6") with attachments, such as
// 51-["ping",{"_placeholder":true,"num":0}]. v3.0.6 keeps it, decoded and up to 17 times as large, until they come.
// Nothing here takes any: so they are counted, and it is handed over as one without, a "2" or a "3".
func (s *session) onBinary(text []byte) {
	count, rest, found := bytes.Cut(text[1:], []byte("-"))
	n, err := strconv.ParseUint(string(count), 10, 0)
	if !found || err != nil || n > maxAttachments {
		s.Close(false)
		return
	}
	s.attachments = int(n)
	plain := map[byte]string{'5': "2", '6': "3"}[text[0]]
	s.onData(types.NewStringBuffer(append([]byte(plain), rest...)))
}

// Polling: each GET waits for packets, each POST brings some.

const (
	maxPost         = 4 * maxMessage         // bytes of a POST: clients before 4.5 post at once what they have, say 100 joins of 300 bytes
	pollTimeout     = 3 * requestTimeout     // for the answer to a poll to leave: maxBacklog at 70 KB/s
	overtakeTimeout = closeTimeout / 4       // for a poll that its session's CLOSE has overtaken
	upgradeDelay    = 100 * time.Millisecond // for an UPGRADE that a poll has overtaken: what Node lets a poll wait
)

var (
	errOverlap  = errors.New("two polls at once")
	errUpgraded = errors.New("this session has left polling")
)

func (s *session) poll(w http.ResponseWriter, r *http.Request) {
	r.Header, r.URL = nil, nil // nothing reads them any more, and it may wait for long
	packets, last, err := s.fetch(r.Context())
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(pollTimeout))
	if err != nil {
		if err != errUpgraded { // a second poll at once, or the client went away: both end the session
			s.abort()
		}
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	length, size := len(packets)-1, 0
	for _, f := range packets {
		length += len(f.text)
		size += len(f.bytes)
	}
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(length))
	w.WriteHeader(http.StatusOK)
	for i, f := range packets { // from the shared frames: an answer of our own would be a copy of each
		if i > 0 {
			w.Write([]byte{0x1e})
		}
		w.Write(f.text)
	}
	s.mu.Lock()
	s.took(size)
	s.writing, s.polled = false, false // only now: else a client could have any number of answers under way that it does not read
	s.mu.Unlock()
	if last {
		s.abort()
	}
	s.flush() // an upgrade may have come meanwhile
}

// fetch waits for something to send, and returns it; last says that the session ends with it. It stays in the queue
// until it has left.
func (s *session) fetch(ctx context.Context) (packets []*frame, last bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.polled {
		return nil, false, errOverlap
	}
	s.polled = true
	came := time.Now()
	defer time.AfterFunc(upgradeDelay, s.flush).Stop() // see released
	defer context.AfterFunc(ctx, s.flush)()
	for len(s.queue) == 0 && s.state != closed && s.wire == nil && !s.released(came) && ctx.Err() == nil {
		s.changed.Wait()
	}
	switch {
	case s.wire != nil:
		return nil, false, errUpgraded
	case ctx.Err() != nil:
		return nil, false, ctx.Err()
	case s.state == closed:
		return []*frame{newPacket(closePacket, "")}, true, nil
	case len(s.queue) == 0:
		s.enqueue(newPacket(noopPacket, ""))
	}
	s.writing = true
	s.pinged = s.pinged || slices.Contains(s.queue, s.ping)
	return slices.Clone(s.queue), s.state == ending, nil
}

// released reports whether a poll is to be answered with NOOP: the client's probe works, and the client sends UPGRADE only
// when no poll is under way. A poll that has just come may have overtaken the UPGRADE: it waits for that.
func (s *session) released(came time.Time) bool {
	return s.probe != nil && s.probe.answered && time.Since(came) >= upgradeDelay
}

func (s *session) post(w http.ResponseWriter, r *http.Request) {
	if status, err := s.receive(w, r); err != nil {
		s.abort()
		http.Error(w, err.Error(), status)
		return
	}
	w.Header().Set("Content-Type", "text/html") // as Node has it: some browsers offer text/plain as a download
	w.WriteHeader(http.StatusOK)
	io.WriteString(w, "ok")
}

// receive handles the packets of a POST. Its error, which ends the session, comes with the status to refuse the POST with.
func (s *session) receive(w http.ResponseWriter, r *http.Request) (status int, err error) {
	if s.posting.Swap(true) { // any number of them could be under way, each with its body
		return http.StatusBadRequest, errors.New("two posts at once")
	}
	defer s.posting.Store(false)
	body, status, err := readBody(w, r, maxPost)
	if err != nil {
		return status, err
	}
	for packet := range bytes.SplitSeq(body, []byte{0x1e}) {
		if len(packet) > maxMessage {
			return http.StatusRequestEntityTooLarge, fmt.Errorf("a message is over %d bytes", maxMessage)
		}
		if !s.admit(len(packet)) {
			break
		}
		kind, text, err := decodePacket(packet)
		if err != nil {
			return http.StatusBadRequest, err
		}
		if kind == closePacket {
			s.end(noopPacket, overtakeTimeout) // it may have overtaken the client's last poll, which is on another connection
			break
		}
		s.onPacket(kind, text)
	}
	return 0, nil
}

// WebSocket

const (
	upgradeTimeout = 10 * time.Second // for a client to try its WebSocket and upgrade to it
	messageTimeout = 10 * time.Second // from a message's first frame to its last
	stallTimeout   = 10 * time.Second // a client that takes nothing of what waits for so long is cut off
	maxUnread      = 2 * maxMessage   // bytes of one message with its frames' headers: a client could send empty ones without end
)

var errTooFast = errors.New("too many frames")

// accept answers a WebSocket handshake. Of subprotocols it takes the first, as Node's ws does: a browser that offered
// some and gets none fails the connection.
func (s *session) accept(rw http.ResponseWriter, r *http.Request) (*conn, error) {
	header := http.Header{}
	if protocols := websocket.Subprotocols(r); len(protocols) > 0 {
		header.Set("Sec-WebSocket-Protocol", protocols[0])
	}
	ws, err := s.server.upgrader.Upgrade(rw, r, header)
	if err != nil {
		return nil, err
	}
	w := ws.NetConn().(*conn) // the listener is ours
	w.session, w.ws, w.bytes = s, ws, 0
	w.raw, _ = w.SyscallConn() // fails for nil alone
	ws.SetReadLimit(maxMessage)
	ws.SetPingHandler(func(data string) error { return s.onControl(w, newFrame(websocket.PongMessage, []byte(data))) })
	ws.SetPongHandler(func(string) error { return s.onControl(w, nil) })
	ws.SetCloseHandler(func(code int, _ string) error {
		payload := []byte{}
		if code != websocket.CloseNoStatusReceived {
			payload = websocket.FormatCloseMessage(code, "")
		}
		return s.onControl(w, newFrame(websocket.CloseMessage, payload))
	})
	return w, nil
}

// onControl answers a control frame of WebSocket's own, if there is an answer.
func (s *session) onControl(w *conn, answer *frame) error {
	size := w.bytes
	w.bytes = 0
	switch {
	case !s.admit(size):
		return errTooFast
	case answer == nil:
		return nil
	}
	return s.reply(w, answer)
}

// reply answers the client by the queue, or, on a probe, past it: polls still empty that.
func (s *session) reply(w *conn, f *frame) error {
	if w.until.IsZero() {
		s.send(f)
		return nil
	}
	_, err := w.Write(f.bytes)
	return err
}

// upgrade serves the WebSocket handshake of a client that polls. A second WebSocket, or one for a session that has
// upgraded or is ending, is accepted and then closed: Engine.IO's public test suite takes a refused handshake for an error.
func (s *session) upgrade(rw http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	free := s.become(probing) // before the handshake is answered: the next may follow at once
	s.mu.Unlock()
	w, err := s.accept(rw, r)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil && free:
		s.become(polling)
	case err == nil && (!free || s.state == closed):
		w.Close()
	case err == nil:
		w.until = time.Now().Add(upgradeTimeout)
		_ = w.SetWriteDeadline(w.until)
		s.probe = w
		go s.read(w)
	}
}

// read handles what the client sends on the wire, until it ends. It is a goroutine of its own.
func (s *session) read(w *conn) {
	defer s.detach(w)
	defer s.server.logPanic("reading from a client failed")
	for {
		kind, text, err := s.next(w)
		probes := !w.until.IsZero()
		switch {
		case err == errTooFast:
			<-time.After(closeTimeout) // it is not read any more, and has this long to read why
			return
		case err != nil:
			return
		case probes && kind == pingPacket && string(text) == "probe":
			if s.reply(w, newPacket(pongPacket, "probe")) != nil {
				return
			}
			s.mu.Lock()
			w.answered = true
			s.mu.Unlock()
			s.flush()
		case probes && kind == upgradePacket:
			s.attach(w)
		case probes:
			return
		case kind == closePacket:
			s.Close(false) // the client's close frame is still to come, and would meet a closed socket
		default:
			s.onPacket(kind, text)
		}
	}
}

// next returns the client's next packet.
func (s *session) next(w *conn) (kind byte, text []byte, err error) {
	_ = w.SetReadDeadline(w.until)
	messageType, reader, err := w.ws.NextReader()
	if err != nil {
		return 0, nil, err
	}
	if w.until.IsZero() {
		_ = w.SetReadDeadline(time.Now().Add(messageTimeout))
	}
	message, err := io.ReadAll(reader)
	if err != nil {
		return 0, nil, err
	}
	if messageType == websocket.TextMessage && !utf8.Valid(message) { // RFC 6455, section 8.1
		invalid := websocket.FormatCloseMessage(websocket.CloseInvalidFramePayloadData, "")
		_ = w.ws.WriteControl(websocket.CloseMessage, invalid, time.Now().Add(closeTimeout))
		return 0, nil, errors.New("a text that is not UTF-8")
	}
	size := max(len(message), w.bytes)
	w.bytes = 0
	if !s.admit(size) {
		return 0, nil, errTooFast
	}
	if messageType == websocket.BinaryMessage {
		return binaryPacket, nil, nil
	}
	return decodePacket(message)
}

// attach has the wire carry everything from here on: the client has sent UPGRADE on it.
func (s *session) attach(w *conn) {
	_ = w.SetWriteDeadline(time.Time{})
	s.mu.Lock()
	s.become(onWebSocket)
	if s.state != closed {
		s.wire, s.probe, w.until = w, nil, time.Time{}
	}
	if s.state == ending { // since the client's last poll
		s.enqueue(goingAway())
	}
	s.mu.Unlock()
	s.flush()
}

// detach ends the session if the wire carried it.
func (s *session) detach(w *conn) {
	w.Close()
	s.mu.Lock()
	carried := s.wire == w
	if !carried { // a probe that came to nothing: the next may try
		s.probe = nil
		s.become(polling)
	}
	s.mu.Unlock()
	if carried {
		s.abort()
	}
}

// upgraded reports whether the session has left polling, or began without.
func (s *session) upgraded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wire != nil
}

// goingAway is the close frame that ends a session from this side.
func goingAway() *frame {
	return newFrame(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseGoingAway, ""))
}

// writer writes the queues of sessions, one after the other. It never blocks: what a socket does not take at once is left
// to a goroutine that waits for it.
type writer struct {
	batch []*frame // several that leave in one system call …
	bytes []byte   // … and their bytes: a copy that serves all sessions whose queues are alike

	// The system call under way. These are fields so that try need not be a new closure each time.
	try  func(fd uintptr) bool
	out  []byte
	wait bool // until the socket takes something
	n    int  // bytes that the socket took: none if it is full
	err  error
}

// maxBatch is how many bytes of frames are copied into one system call: many chat lines, and few of a large event's.
const maxBatch = 64 << 10

var writers = sync.Pool{New: func() any {
	w := new(writer)
	w.try = func(fd uintptr) bool {
		n, err := syscall.Write(int(fd), w.out)
		for err == syscall.EINTR {
			n, err = syscall.Write(int(fd), w.out)
		}
		if err == syscall.EAGAIN {
			return !w.wait
		}
		w.n, w.err = max(n, 0), err
		return true
	}
	return w
}}

// flushAll flushes sessions, and lets other goroutines run now and then: small rooms must not wait for a large one.
func flushAll(sessions []*session) {
	w := writers.Get().(*writer)
	defer w.release()
	for i, s := range sessions {
		if i%64 == 63 {
			runtime.Gosched()
		}
		s.mu.Lock()
		s.changed.Broadcast()
		if s.wire != nil && !s.writing {
			s.writing = true
			w.write(s)
		}
		s.mu.Unlock()
	}
}

func (w *writer) release() {
	clear(w.batch) // no frame is kept
	w.batch, w.out, w.wait = w.batch[:0], nil, false
	writers.Put(w)
}

// write empties a session's queue into its wire. It is called with the lock, and lets go of it for each system call.
func (w *writer) write(s *session) {
	for s.state != closed && len(s.queue) > 0 {
		w.out, w.n, w.err = w.pack(s)[s.sent:], 0, nil
		if w.wait {
			_ = s.wire.SetWriteDeadline(time.Now().Add(stallTimeout))
		}
		s.mu.Unlock()
		err := s.wire.raw.Write(w.try)
		if err == nil {
			err = w.err
		}
		s.mu.Lock()
		s.took(w.n)
		switch {
		case s.state == closed:
		case err != nil:
			s.lose()
			s.become(ending)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				go s.cutOff("it took nothing for " + stallTimeout.String())
			} else {
				go s.abort() // not here: it takes the lock
			}
			return
		case w.n < len(w.out) && !w.wait:
			go s.drain()
			return
		}
	}
	if w.wait {
		_ = s.wire.SetWriteDeadline(time.Time{}) // one that has passed fails even a write that need not wait
	}
	s.writing = false
}

// drain goes on with a session's queue where a flush found the socket full.
func (s *session) drain() {
	w := writers.Get().(*writer)
	defer w.release()
	w.wait = true
	s.mu.Lock()
	defer s.mu.Unlock()
	w.write(s)
}

// pack returns the bytes of the first frames of a session's queue, which are about to leave.
func (w *writer) pack(s *session) []byte {
	n, size := 1, len(s.queue[0].bytes)
	for n < len(s.queue) && size+len(s.queue[n].bytes) <= maxBatch {
		size += len(s.queue[n].bytes)
		n++
	}
	s.pinged = s.pinged || slices.Contains(s.queue[:n], s.ping)
	if n == 1 {
		return s.queue[0].bytes
	}
	if !slices.Equal(w.batch, s.queue[:n]) {
		w.batch = append(w.batch[:0], s.queue[:n]...)
		w.bytes = w.bytes[:0]
		for _, f := range w.batch {
			w.bytes = append(w.bytes, f.bytes...)
		}
	}
	return w.bytes
}
