// Command socketio is the chat server of a Laravel site that has left Pusher.
//
// Browsers connect to it with the official Socket.IO client and join the room of a chat session, the admins'
// room, or any channel of Laravel's by its name. Laravel stores a message in its database, then posts it
// here, and everyone in the room sees it.
//
//	GET  /socket.io/  Socket.IO: protocol 5 over Engine.IO 4, by WebSocket and by HTTP long-polling
//	POST /broadcast   {"channel" or "channels", "event", "data", "socket"}: an event for the rooms' members
//	GET  /health      counters as JSON: 200, or 503 while stopping or out of reach of Redis
//
// A client sends join-session, join-admin, leave-session, leave-admin, join, leave, whisper and ping. It is
// answered with joined-session, joined-admin, left-session, left-admin, joined, left and pong, or with
// error.
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
// # Map
//
// Out: handleBroadcast checks Laravel's event. With Redis it goes there by cluster.publish, and comes back to
// each daemon's cluster.deliver. hub.broadcast makes frames of it and puts them into the queue of each
// member's session. A queue empties into the session's WebSocket (writer.write), or into the answer to its
// poll (session.poll).
//
// In: session.read (a WebSocket) or session.readPost (polling) takes a packet, admit lets it in, onMessage
// takes it apart. An event is handled in that same goroutine, and its answer goes into the session's own
// queue. Only CONNECT and DISCONNECT go through the library. Whispers go on by a queue of their own
// (sendWhispers) to hub.broadcast, or to Redis.
//
// Goroutines: one for each WebSocket, which reads it. net/http's, one for each connection that polls, posts
// or broadcasts. Whoever broadcasts also writes to the small rooms: with Redis that is the subscription, and
// for whispers sendWhispers. hub.writeLarge writes to the large rooms, while there is something to write.
// session.drain for a client while its socket is full. The library's queue, one for each of its sockets,
// which runs onConnection. With Redis cluster.run, whose subscription delivers; its two pulses, and one for
// each PUBLISH. sendWhispers. supervise tells systemd. Heartbeats, ends that wait and refreshes are timers.
//
// Locks, in the order in which they are taken: session.receiving (one packet of a client at a time),
// session.closing (its end is told once), hub.mu (who is in which room, and the one order of all broadcasts),
// session.mu (a session's state and its queue). Nothing is written to a client under the last two.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"container/list"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

// The limits, in the order of the README's table, each with its reason and the function that uses it.
// Redis's times are a timeline of their own, at the head of that section.
const (
	// Who may be here.
	joinTimeout    = time.Second      // when all are taken, a newcomer displaces who has been in no room for so long (evict)
	connectTimeout = 10 * time.Second // from the handshake to Socket.IO's CONNECT, which a client sends at once (newServer)
	upgradeTimeout = 10 * time.Second // for a client that polls to try its WebSocket and upgrade to it (upgrade)
	maxHeader      = 16 << 10         // bytes of a request's header: it is the cookies, of 4 KiB each at most (newServer)
	minSecret      = 32               // characters: any visitor has a signature to try guesses on, offline (loadConfig)
	maxOrigin      = 300              // bytes of an Origin: a name has 253 at most (allows)
	maxQuery       = 4 << 10          // bytes of a query: front ends put tokens there. Go takes 60 µs a KiB (handleSocketIO)

	// What a client may send.
	maxRooms       = 100              // session rooms and channels of one socket: an admin with a hundred chats open (join)
	maxMessage     = 16 << 10         // bytes of a message: it only joins, leaves, whispers and pings (accept, readPost)
	maxPost        = 4 * maxMessage   // bytes of a POST: clients before 4.5 post all that they have, say 100 joins of 300 bytes (readPost)
	maxNumber      = 16               // digits of an acknowledgement's number: it is sent back (onMessage)
	maxNamespace   = 100              // bytes of another namespace's name, for the same reason (onMessage)
	maxUnread      = 2 * maxMessage   // bytes of a WebSocket message with its frames' headers: empty frames could be endless (Read)
	messageTimeout = 10 * time.Second // from a WebSocket message's first frame to its last (next)
	messageRate    = 5                // a client's messages a second, in the long run … (admit)
	messageBurst   = 8 + maxRooms     // … and at once: a page comes back with an upgrade's two, CONNECT, join-admin and maxRooms joins
	maxWhispered   = 100              // members of a channel on one node: one whisper is so many deliveries (whisper, broadcast)

	// What may wait for a client.
	maxBacklog   = 2*maxBody + 1<<10      // bytes for one client, before one frame more: so three of the largest may come at once (fits)
	minBacklog   = 4 << 10                // bytes that each may have, however much waits for all; of answers half as many (fits)
	maxWaiting   = 64 << 20               // bytes for all clients, a shared frame counted once; answers may fill half of it (fits)
	maxWhispers  = 256                    // whispers that wait to be sent: past it they are lost (whisper)
	stallTimeout = 10 * time.Second       // for a WebSocket to take something of what waits (writer.write)
	pollTimeout  = 3 * requestTimeout     // for the answer to a poll to leave: maxBacklog at 70 KB/s (poll)
	closeTimeout = time.Second            // for a client to take what is on its way to it, and to answer a close (end, shutdown)
	upgradeDelay = 100 * time.Millisecond // for an UPGRADE that a poll has overtaken: what Node lets a poll wait (released)
	sendBuffer   = 64 << 10               // bytes in the kernel, which doubles it; else a client that reads nothing takes 4 MB (listen)
	readBuffer   = 64 << 10               // as many for what nobody reads. Of 32 KiB, one loopback segment, full ones would be dropped (listen)

	// Broadcasts.
	maxBody        = 1 << 20          // bytes of a /broadcast request: nginx's default client_max_body_size
	maxChannels    = 100              // of one /broadcast: Pusher's limit, which Laravel code knows
	maxCopies      = 8 * maxBody      // bytes of data times channels: each channel needs a copy with its name
	maxEvent       = 200              // characters of an event's name: Pusher's limit
	maxSocketID    = 64               // characters of a Socket.IO id: the library's have 20
	requestTimeout = 10 * time.Second // for a request's header, and again for its body
	idleTimeout    = 90 * time.Second // of a kept-alive HTTP connection: longer than nginx's 60 s, so that nginx closes first

	// The fan-out.
	largeRoom = 16       // members of a room whose broadcaster writes to them itself: 16 system calls are some 50 µs (broadcast)
	maxBatch  = 64 << 10 // bytes that are copied into one system call, and that large rooms may be behind (writer.load, broadcast)

	// The process.
	notifyInterval = 10 * time.Second // between two reports to systemd, which waits for WatchdogSec=30 (supervise)
	otherFiles     = 64               // open files that are no client's: Redis, the log, requests of Laravel (checkFileLimit)
	// gcPercent is how much the heap may grow, in percent of what is live, before the collector runs (Go's
	// default: 100). Nearly all of it is idle connections' state, so half the head-room saves a quarter of
	// the memory and costs a broadcast no measurable time.
	gcPercent = 50
)

func main() {
	logging.Disable()              // go-redis's: what it would print is in the errors that it returns
	signal.Ignore(syscall.SIGPIPE) // which a write to stderr raises when journald has died, and which ends a Go program
	ctx, stop := signal.NotifyContext(context.Background(), stopSignals()...)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "socketio:", err)
		os.Exit(exitStatus(err))
	}
}

// stopSignals are those that end the daemon. One that is ignored from the start, as nohup does it, stays
// ignored.
func stopSignals() []os.Signal {
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
	if signal.Ignored(syscall.SIGHUP) {
		return signals[:2]
	}
	return signals
}

var errArguments = errors.New("it takes no arguments: the environment configures it, see the README's Configuration")

// exitStatus is 2 for a wrong call, as a shell has it, and 1 for a start that failed.
func exitStatus(err error) int {
	if errors.Is(err, errArguments) {
		return 2
	}
	return 1
}

// run serves until ctx is done, and then shuts down.
func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) error {
	if len(args) > 0 {
		return fmt.Errorf("version %s: %w", version, errArguments)
	}
	cfg, err := loadConfig(getenv)
	if err != nil {
		return err
	}
	if getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	listener, err := listen(ctx, net.JoinHostPort(cfg.host, strconv.Itoa(cfg.port)))
	if err != nil {
		return err // "listen tcp 127.0.0.1:3001: bind: address already in use"
	}
	handler := slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel})
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
	go s.sendWhispers(ctx)
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(listener) }()
	go s.supervise(ctx, listener.Addr().String(), getenv("NOTIFY_SOCKET"))
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", listener.Addr(), err)
	case <-ctx.Done():
		s.shutdown()
		return nil
	}
}

// listen opens the port, with buffers that each connection inherits from it (tcp(7)).
func listen(ctx context.Context, addr string) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var send, read error
		err := raw.Control(func(fd uintptr) {
			send = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer)
			read = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, readBuffer)
		})
		return errors.Join(err, send, read)
	}}
	return config.Listen(ctx, "tcp", addr)
}

// throttledHandler passes on a warning or an error at most once a second for each message, so that no client
// can flood the journal. Messages are fixed texts, hence each names one cause: up to its first number, since
// net/http's name ports and delays.
type throttledHandler struct {
	slog.Handler
	mu   sync.Mutex
	last map[string]time.Time
}

func (h *throttledHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelWarn {
		return h.Handler.Handle(ctx, r)
	}
	cause := r.Message
	if i := strings.IndexAny(cause, "0123456789"); i >= 0 {
		cause = cause[:i]
	}
	h.mu.Lock()
	recent := r.Time.Sub(h.last[cause]) < time.Second
	if !recent {
		h.last[cause] = r.Time
	}
	h.mu.Unlock()
	if recent {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

// logPanic, deferred, logs a panic that would end the process: of a goroutine that reads from a client, or
// that has to do with Redis.
func (s *server) logPanic(message string) {
	if err := recover(); err != nil {
		s.log.Error(message, "error", err, "stack", string(debug.Stack()))
	}
}

// The server

type server struct {
	config
	log     *slog.Logger
	http    *http.Server
	sio     *socket.Server
	hub     *hub
	cluster *cluster // nil without Redis
	started time.Time

	sessions    sync.Map     // from an Engine.IO session's id to its *session
	connections atomic.Int64 // their number, and that of handshakes under way
	waiting     atomic.Int64 // bytes that wait for clients, see fits
	whispers    chan message // to be sent, see sendWhispers
	stopping    atomic.Bool
	upgrader    websocket.Upgrader
	request     *types.HttpContext // for Socket.IO, which keeps what it is given, 4 KB of headers a client: so all share an empty one

	broadcasts, dropped atomic.Int64 // since the start, for /health
}

func newServer(cfg config, log *slog.Logger) *server {
	s := &server{config: cfg, log: log, hub: newHub(), whispers: make(chan message, maxWhispers), started: time.Now()}
	s.upgrader = websocket.Upgrader{
		HandshakeTimeout: requestTimeout,
		ReadBufferSize:   256, // bytes: a client sends little
		WriteBufferPool:  new(sync.Pool),
		CheckOrigin:      func(*http.Request) bool { return true }, // see allowOrigin
		Error:            func(w http.ResponseWriter, _ *http.Request, _ int, _ error) { refuseEngine(w, 3, "Bad request") },
	}
	opts := socket.DefaultServerOptions()
	opts.SetConnectTimeout(connectTimeout)
	opts.SetAdapter(s.hub) // see there
	s.sio = socket.NewServer(nil, opts)
	_ = s.sio.On("connection", s.onConnection)
	s.request = types.NewHttpContext(struct{ http.ResponseWriter }{}, &http.Request{URL: &url.URL{}})
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// No ReadTimeout, no WriteTimeout: both would end a long poll that waits for its first message.
	}
	return s
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/socket.io/{$}", s.handleSocketIO)
	mux.HandleFunc("/socket.io/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the client is not served here: take dist/socket.io.min.js of the npm package socket.io-client", http.StatusNotFound)
	})
	mux.HandleFunc("/broadcast", s.handleBroadcast)
	mux.HandleFunc("/broadcast/{$}", s.handleBroadcast) // Express took both
	mux.HandleFunc("/broadcast/", func(w http.ResponseWriter, _ *http.Request) {
		refuseBroadcast(w, http.StatusNotFound, "post to /broadcast")
	})
	mux.HandleFunc("GET /health", s.handleHealth)
	return mux
}

// shutdown lets every client go in such a way that socket.io-client reconnects by itself, and nothing that
// /broadcast was answered 200 for is lost on the way: it is in the queues, and each session ends behind its
// queue. (With Redis, what comes back later misses this node's clients, as any node's messages do: they
// reconnect and fetch it.) It takes at most a quarter more than closeTimeout.
func (s *server) shutdown() {
	s.log.Info("stopping", "connections", s.connections.Load())
	s.stopping.Store(true)
	s.hub.stop()
	for _, v := range s.sessions.Range {
		v.(*session).end("server shutting down")
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

// checkFileLimit warns of a limit that MAX_CONNECTIONS will meet. Go's os package has raised the soft one to
// the hard one.
func (s *server) checkFileLimit() {
	var limit syscall.Rlimit
	want := uint64(s.maxConnections + otherFiles)
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < want {
		s.log.Warn("file limit too low for MAX_CONNECTIONS: raise LimitNOFILE= in socketio.service, or ulimit -n",
			"limit", limit.Cur, "want", want)
	}
}

// supervise tells systemd (sd_notify(3)) that the daemon serves, how many clients it has and that it lives,
// as long as its self-check passes.
func (s *server) supervise(ctx context.Context, addr, notifySocket string) {
	if notifySocket == "" {
		return
	}
	notify := func(state string) {
		conn, err := net.Dial("unixgram", notifySocket)
		if err == nil {
			_, err = io.WriteString(conn, state)
			conn.Close()
		}
		if err != nil {
			s.log.Warn("systemd can't be told", "error", err)
		}
	}
	tick := time.NewTicker(notifyInterval)
	defer tick.Stop()
	for {
		if err := s.selfCheck(ctx, addr); err != nil && ctx.Err() == nil {
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

// selfCheck asks the listener for /health, and takes the lock that every broadcast takes.
func (s *server) selfCheck(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: addr, Path: "/health"}, Header: http.Header{}}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req.WithContext(ctx)) // past any HTTP_PROXY
	if err != nil {
		return err
	}
	s.hub.counts() // of /health only who asks a loopback address is told them
	return resp.Body.Close()
}

// Configuration

type config struct {
	host           string
	port           int
	secrets        []string       // the first signs and is expected; a second one is accepted too; none: open mode
	origins        []string       // as canonicalOrigin returns them; "*" among them: any
	redis          *redis.Options // nil: this daemon is alone
	maxConnections int
	pingInterval   time.Duration
	pingTimeout    time.Duration
	logLevel       slog.Level
}

const defaultOrigins = "http://localhost:8000,http://127.0.0.1:8000,http://localhost:5173,http://127.0.0.1:5173"

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
	if strings.ContainsAny(c.host, "[]/ ") { // what else is none, net.Listen says
		bad("SOCKET_HOST", c.host, "an address to listen on, such as 127.0.0.1 or ::1, without brackets")
	}
	c.port = number("SOCKET_PORT", "3001", 0, 65535, "a port (0–65535)")
	c.maxConnections = number("MAX_CONNECTIONS", "10000", 1, 10_000_000, "a number of connections (1–10000000)")
	c.pingInterval = duration("PING_INTERVAL", "25s")
	c.pingTimeout = duration("PING_TIMEOUT", "20s")
	if v := get("SOCKETIO_SECRET", ""); v != "" {
		c.secrets = strings.Split(v, ",")
		errs = append(errs, checkSecrets(c.secrets))
	}
	for entry := range strings.SplitSeq(get("CORS_ORIGINS", defaultOrigins), ",") {
		entry = strings.TrimSpace(entry)
		origin, ok := parseOrigin(entry)
		if !ok {
			if i := strings.LastIndexByte(entry, '@'); i >= 0 {
				entry = "…" + entry[i:] // in front of it may be a password
			}
			bad("CORS_ORIGINS", entry, "an origin as location.origin shows it in the page's console, such as https://example.com "+
				"or http://localhost:8000, nor https://*.example.com for all subdomains, nor * for any")
		}
		c.origins = append(c.origins, origin)
	}
	if v := get("REDIS_URL", ""); v != "" {
		var err error
		c.redis, err = redis.ParseURL(v)
		if err != nil || !strings.HasPrefix(v, "redis://") && !strings.HasPrefix(v, "rediss://") { // not quoted: it may hold a password
			errs = append(errs, errors.New("REDIS_URL: want redis://[user:password@]host[:port][/database], or rediss:// for TLS; "+
				"in a password write # as %23, / as %2F, % as %25 and @ as %40"))
		}
	}
	level := get("LOG_LEVEL", "info")
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil || strings.ContainsAny(level, "+-") { // slog takes warn+1
		bad("LOG_LEVEL", level, "debug, info, warn or error")
	}
	return c, errors.Join(errs...)
}

// checkSecrets says what is wrong with SOCKETIO_SECRET, without quoting it.
func checkSecrets(secrets []string) error {
	for _, secret := range secrets {
		if strings.ContainsAny(secret[:min(1, len(secret))], `"'`) { // docker run --env-file keeps them, Laravel's dotenv does not
			return errors.New("SOCKETIO_SECRET: it stands in quotation marks, which count as a part of it here: leave them out")
		}
		unprintable := func(r rune) bool { return r <= ' ' || r > '~' }
		if len(secret) < minSecret || len(secrets) > 2 || strings.ContainsFunc(secret, unprintable) {
			return errors.New("SOCKETIO_SECRET: want a secret of 32 or more printable ASCII characters without white space, " +
				"or two of them as new,old; make one with openssl rand -hex 32")
		}
	}
	return nil
}

// originName is a host's name as browsers send it, also behind the *. of a wildcard. One whose last part is
// a number they take for an IPv4 address.
var originName = regexp.MustCompile(`^(\*\.)?([a-z0-9_-]+\.)*[a-z0-9_-]*[a-z_-][a-z0-9_-]*\.?$`)

// parseOrigin returns an entry of CORS_ORIGINS in its canonical form; ok: a browser can send it, or it is a
// wildcard.
func parseOrigin(entry string) (origin string, ok bool) {
	if entry == "*" {
		return entry, true
	}
	origin = canonicalOrigin(entry)
	u, err := url.Parse(origin)
	if err != nil || origin != u.Scheme+"://"+u.Host {
		return "", false
	}
	addr, notAddr := netip.ParseAddr(u.Hostname())
	isHost := originName.MatchString(u.Hostname()) || notAddr == nil && addr.String() == u.Hostname()
	port, _ := strconv.ParseUint(u.Port(), 10, 16)
	isPort := u.Port() == "" || u.Port() == strconv.FormatUint(port, 10) && port > 0
	// Not the sign of kelvin, whose lower case is a k: browsers send other letters as xn--. And no page has
	// these schemes.
	isASCII := !strings.ContainsFunc(entry, func(r rune) bool { return r > '~' })
	isPage := !slices.Contains([]string{"ws", "wss", "ftp"}, u.Scheme)
	return origin, isHost && isPort && isASCII && isPage
}

// canonicalOrigin returns an origin as browsers send it (RFC 6454, section 6.2): in lower case, without its
// scheme's default port.
func canonicalOrigin(origin string) string {
	scheme, host, _ := strings.Cut(strings.ToLower(origin), "://")
	switch scheme {
	case "http":
		host = strings.TrimSuffix(host, ":80")
	case "https":
		host = strings.TrimSuffix(host, ":443")
	}
	return scheme + "://" + host
}

// HTTP: /broadcast and /health

// message is an event for the members of channels. In JSON it is the header of a message between daemons.
type message struct {
	ID       string          `json:"id"` // of that message, made by publish
	Channels []string        `json:"channels"`
	Except   socket.SocketId `json:"except,omitempty"` // Laravel's toOthers(), or who whispers; empty: nobody
	Event    string          `json:"event"`
	Whisper  bool            `json:"whisper,omitempty"` // of a client: only for channels of at most maxWhispered members
	data     []byte          // JSON, byte for byte as it came: Marshal would compact it and escape < and U+2028
}

// check says what is wrong with a message, whoever sent it. Its errors name the field.
func (m *message) check() error {
	copies := 0
	for _, name := range m.Channels {
		channel, err := parseChannel(name)
		if err != nil {
			return fmt.Errorf("channel %.200q: %w", name, err)
		}
		if channel.rooms == nil { // the chat's own are mostly joined by session, with one frame for all
			copies++
		}
	}
	if copies*len(m.data) > maxCopies {
		return fmt.Errorf("data for %d channels is over %d bytes: each channel gets a copy", copies, maxCopies)
	}
	if m.Event == "" || utf8.RuneCountInString(m.Event) > maxEvent {
		return fmt.Errorf("event has to be a string of 1 to %d characters", maxEvent)
	}
	if socket.SOCKET_RESERVED_EVENTS.Has(m.Event) {
		return fmt.Errorf("event %q is reserved by Socket.IO: choose another name", m.Event)
	}
	return nil
}

// rooms returns the rooms that a message goes to: the chat's, whose members get the event, and by name those
// of channels, whose members get it with the channel's name. A channel of the chat's own is both.
func (m *message) rooms() (chat, named []string) {
	for _, name := range m.Channels {
		channel, _ := parseChannel(name)
		switch {
		case m.Whisper:
			named = append(named, name)
		case channel.rooms != nil:
			chat = append(chat, channel.rooms...)
			named = append(named, "private-"+channel.plain)
		case channel.prefix != "presence-": // nobody is in a presence channel
			named = append(named, name)
		}
	}
	slices.Sort(chat)
	slices.Sort(named)
	return slices.Compact(chat), slices.Compact(named)
}

func (s *server) handleBroadcast(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		refuseBroadcast(w, http.StatusMethodNotAllowed, "post it: POST /broadcast")
		return
	}
	if r.Header.Get("Origin") != "" {
		refuseBroadcast(w, http.StatusForbidden, "browsers may not broadcast: post to your Laravel application instead")
		return
	}
	if len(s.secrets) == 0 && !isLocal(r) {
		s.log.Warn("broadcast refused: not a local request, and SOCKETIO_SECRET is not set", "addr", clientAddr(r))
		refuseBroadcast(w, http.StatusForbidden, openModeRefusal)
		return
	}
	if len(s.secrets) > 0 && !s.authorized(r.Header.Get("Authorization")) {
		s.log.Warn("broadcast refused: no or wrong bearer token", "addr", clientAddr(r))
		w.Header().Set("WWW-Authenticate", "Bearer")
		refuseBroadcast(w, http.StatusUnauthorized, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has")
		return
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		refuseBroadcast(w, http.StatusUnsupportedMediaType, "send the body as it is, without Content-Encoding")
		return
	}
	body, status, err := readBody(w, r, maxBody)
	if err != nil {
		refuseBroadcast(w, status, err.Error())
		return
	}
	m, err := parseBroadcast(body)
	if err != nil {
		refuseBroadcast(w, http.StatusBadRequest, err.Error())
		return
	}
	answer := map[string]any{"success": true, "message": "Message broadcasted"}
	var delivered int
	if s.cluster == nil {
		delivered, err = s.hub.broadcast(m)
	} else {
		delivered, answer["nodes"], err = s.cluster.publish(m)
	}
	if err != nil {
		w.Header().Set("Retry-After", "1")
		refuseBroadcast(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	answer["delivered"] = delivered
	s.broadcasts.Add(1)
	s.log.Debug("broadcast", "channels", m.Channels, "delivered", delivered)
	respond(w, http.StatusOK, answer)
}

const openModeRefusal = "this server is in open mode and serves its own machine only: " +
	"set SOCKETIO_SECRET here and in Laravel (a container, as of Sail or Docker, is another machine)"

func refuseBroadcast(w http.ResponseWriter, status int, reason string) {
	respond(w, status, map[string]any{"success": false, "error": reason})
}

// authorized compares in constant time. How long a secret is may show: the README says it.
func (s *server) authorized(header string) bool {
	return slices.ContainsFunc(s.secrets, func(secret string) bool {
		return hmac.Equal([]byte(header), []byte("Bearer "+secret))
	})
}

// readBody reads what a request brings, within requestTimeout. Its error comes with the status to refuse the
// request with.
func readBody(w http.ResponseWriter, r *http.Request, most int64) (body []byte, status int, err error) {
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(requestTimeout)) // an error shows up in the read itself
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is over %d bytes", most)
	}
	if err != nil {
		return nil, http.StatusBadRequest, errors.New("the body did not arrive whole")
	}
	_ = control.SetReadDeadline(time.Time{})
	return body, 0, nil
}

// parseBroadcast checks a body. Its errors are sentences that name the field.
func parseBroadcast(body []byte) (message, error) {
	var m message
	var fields map[string]json.RawMessage
	body = bytes.TrimPrefix(body, []byte("\ufeff")) // a BOM, as Express drops it
	switch {
	case !utf8.Valid(body):
		return m, errors.New("the body is not UTF-8")
	case !json.Valid(body):
		return m, errors.New("the body is not JSON")
	case json.Unmarshal(body, &fields) != nil, fields == nil:
		return m, errors.New("the body has to be a JSON object")
	}
	given := func(name string) bool { return len(fields[name]) > 0 && string(fields[name]) != "null" }

	m.Channels = []string{""}
	switch {
	case given("channel") && given("channels"):
		return m, errors.New("give channel or channels, not both")
	case given("channels"):
		if json.Unmarshal(fields["channels"], &m.Channels) != nil || len(m.Channels) == 0 || len(m.Channels) > maxChannels {
			return m, fmt.Errorf("channels has to be a list of 1 to %d channel names", maxChannels)
		}
	case !given("channel") || json.Unmarshal(fields["channel"], &m.Channels[0]) != nil:
		return m, errors.New("channel has to be a string, such as chat-session.5 or private-orders.5")
	}
	if given("socket") && json.Unmarshal(fields["socket"], &m.Except) != nil {
		return m, errors.New("socket has to be a string: the Socket.IO id that is to be left out")
	}
	if len(m.Except) > maxSocketID { // nobody's: a page may send what it likes as X-Socket-ID
		m.Except = ""
	}
	m.data = fields["data"]
	if m.data == nil {
		m.data = []byte("{}")
	}
	_ = json.Unmarshal(fields["event"], &m.Event) // what is no string leaves it empty
	return m, m.check()
}

func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) {
	health := map[string]any{"status": "ok", "timestamp": timestamp()}
	code := http.StatusOK
	local := isLocal(r)
	if s.cluster != nil && !s.cluster.up.Load() {
		health["status"], code = "degraded", http.StatusServiceUnavailable
		if local {
			health["reason"] = errNoRedis.Error()
		}
	}
	if s.stopping.Load() {
		health["status"], code = "stopping", http.StatusServiceUnavailable
	}
	if local { // the rest would tell an attacker whether an admin is there, and how the attack goes
		s.addCounts(health)
	}
	respond(w, code, health)
}

func (s *server) addCounts(health map[string]any) {
	memory := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(memory)
	health["sessions"], health["admins"] = s.hub.counts()
	health["connections"] = s.connections.Load()
	health["version"] = version
	health["uptime"] = int64(time.Since(s.started).Seconds())
	health["memory"] = memory[0].Value.Uint64() - memory[1].Value.Uint64()
	health["broadcasts"] = s.broadcasts.Load()
	health["deliveries"] = s.hub.deliveries.Load()
	health["dropped"] = s.dropped.Load()
	if s.cluster != nil {
		health["nodes"] = s.cluster.nodes.Load()
	}
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

// isLocal reports whether a request comes from this machine itself, and not through a proxy on it, which
// shows by what it adds, by nginx's HTTP/1.0, or by a Host that is not this machine's.
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

// hasLoopbackHost reports whether Host names this machine in such a way that no DNS answer could make
// another name of it.
func hasLoopbackHost(r *http.Request) bool {
	addr, err := netip.ParseAddr(requestHost(r))
	return requestHost(r) == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

// requestHost returns Host in lower case, without its port and an IPv6 address' brackets.
func requestHost(r *http.Request) string { return strings.ToLower((&url.URL{Host: r.Host}).Hostname()) }

// Rooms and fan-out
//
// A room is a chat session's, the admins', or a channel's. The chat's rooms have the names that the Node
// server gave them, and a channel's has a colon in front of its name, which no session id and no channel may
// have: so a channel called session-5 is not a session's room.

const adminRoom = "admin-room"

func sessionRoom(sessionID string) string { return "session-" + sessionID }
func channelRoom(channel string) string   { return ":" + channel }
func isSessionRoom(room string) bool      { return strings.HasPrefix(room, sessionRoom("")) }

// isSessionID and isChannel report whether a text is one. The characters are Pusher's; a colon would make
// the signed text ambiguous.
func isSessionID(text string) bool { return isName(text, 128) }
func isChannel(text string) bool   { return isName(text, 164) }

func isName(text string, most int) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-=@,.;"
	for i := range len(text) {
		if strings.IndexByte(allowed, text[i]) < 0 {
			return false
		}
	}
	return text != "" && len(text) <= most
}

var (
	errSessionID = errors.New("sessionId has to be a string or an integer, 1 to 128 characters of A-Z a-z 0-9 _ - = @ , . ;")
	errChannel   = errors.New("a channel's name has 1 to 164 characters of A-Z a-z 0-9 _ - = @ , . ;")
	errStopped   = errors.New("the server is stopping")
)

// channelName is a channel's name, taken apart.
type channelName struct {
	prefix, plain string   // Pusher's prefix, and the rest
	rooms         []string // of the chat, if the channel is one of the chat's own
}

func parseChannel(name string) (c channelName, err error) {
	if !isChannel(name) {
		return c, errChannel
	}
	c.plain = name
	for _, prefix := range []string{"private-", "presence-"} {
		if plain, ok := strings.CutPrefix(name, prefix); ok {
			c.prefix, c.plain = prefix, plain
			break
		}
	}
	id, isSession := strings.CutPrefix(c.plain, "chat-session.")
	switch {
	case c.plain == "admin-chat":
		c.rooms = []string{adminRoom}
	case isSession && !isSessionID(id):
		return c, errSessionID
	case isSession:
		c.rooms = []string{sessionRoom(id), adminRoom}
	}
	return c, nil
}

// hub is the one index of who is in which room, and the library's adapter for it. The library's own
// (v3.0.6) loses a member when a leave meets a join of the same room, and encodes a broadcast anew for each
// member.
//
// A broadcast puts its frame into the queue of every member, under one lock: so all members get all
// broadcasts in one order. Whose wire was idle is claimed by that, and written to: of small rooms by the
// broadcaster itself, of large ones by one goroutine for all (writeLarge). What comes for a member who is
// claimed waits in its queue and leaves together: so a busy room takes less than a system call a message,
// and a quiet or small one never waits.
type hub struct {
	socket.Adapter // for what the library asks of an adapter and nothing here uses

	mu       sync.Mutex // taken before a session's; guards all that follows, and a session's fields that say so
	members  map[socket.SocketId]*session
	rooms    map[string]map[*session]struct{} // none is empty
	sessions int                              // of these, the rooms of chat sessions
	roomless list.List                        // of *session, who are in no room: the longest first
	sequence uint64                           // number of the last broadcast
	stopped  bool

	claimed []*session // of large rooms, to be written to by writeLarge …
	writing bool       // … which runs
	behind  int        // bytes of frames of large rooms that it has still to write
	caught  sync.Cond  // of mu: it has written some

	deliveries atomic.Int64 // since the start, for /health
}

func newHub() *hub {
	h := &hub{Adapter: socket.MakeAdapter(), members: make(map[socket.SocketId]*session), rooms: make(map[string]map[*session]struct{})}
	h.caught.L = &h.mu
	return h
}

// New makes the hub its own constructor: there is one namespace, hence one adapter.
func (h *hub) New(socket.Namespace) socket.Adapter { return h }

// AddAll is the library's join, of each socket to its private room: nothing here needs it.
func (h *hub) AddAll(socket.SocketId, *types.Set[socket.Room]) {}

// DelAll takes a connection out of all rooms. The library calls it when the connection has left the
// namespace: it may have left that alone, and keep its connection.
func (h *hub) DelAll(id socket.SocketId) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.members[id]; s != nil {
		delete(h.members, id)
		for _, room := range slices.Clone(s.rooms) {
			h.remove(s, room)
		}
	}
}

// enter makes a connection known: from now on it may join rooms, until DelAll.
func (h *hub) enter(id socket.SocketId, s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.members[id] = s
}

// join puts a connection into a room, unless it is in maxRooms of them. The admins' room does not count.
func (h *hub) join(id socket.SocketId, room string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.members[id]
	if s == nil || slices.Contains(s.rooms, room) { // gone, or in it already
		return true
	}
	counted := len(s.rooms)
	if slices.Contains(s.rooms, adminRoom) {
		counted--
	}
	if counted >= maxRooms && room != adminRoom {
		return false
	}
	s.rooms = append(s.rooms, room)
	h.trackRoomless(s)
	if h.rooms[room] == nil {
		h.rooms[room] = make(map[*session]struct{})
		if isSessionRoom(room) {
			h.sessions++
		}
	}
	h.rooms[room][s] = struct{}{}
	return true
}

// leave takes a connection out of a room. What went into its queue before still leaves, ahead of the answer.
func (h *hub) leave(id socket.SocketId, room string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.members[id]; s != nil {
		h.remove(s, room)
	}
}

func (h *hub) remove(s *session, room string) {
	s.rooms = slices.DeleteFunc(s.rooms, func(joined string) bool { return joined == room })
	h.trackRoomless(s)
	if _, in := h.rooms[room][s]; !in {
		return
	}
	delete(h.rooms[room], s)
	if len(h.rooms[room]) == 0 {
		delete(h.rooms, room)
		if isSessionRoom(room) {
			h.sessions--
		}
	}
}

// size returns how many are in a room, and whether a connection is one of them.
func (h *hub) size(room string, id socket.SocketId) (members int, joined bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, joined = h.rooms[room][h.members[id]]
	return len(h.rooms[room]), joined
}

// counts returns the number of session rooms that somebody is in, and of sockets in the admins' room.
func (h *hub) counts() (sessions, admins int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sessions, len(h.rooms[adminRoom])
}

// trackRoomless puts a session that is in no room at the end of those, and takes any other out of them.
func (h *hub) trackRoomless(s *session) {
	outside := len(s.rooms) == 0 && s.isOpen()
	if outside && s.roomless == nil {
		s.since, s.roomless = time.Now(), h.roomless.PushBack(s)
	}
	if !outside && s.roomless != nil {
		h.roomless.Remove(s.roomless)
		s.roomless = nil
	}
}

// track is trackRoomless for a session that has just been opened, or has closed.
func (h *hub) track(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trackRoomless(s)
}

// evict ends the session that has been in no room for the longest, if that is joinTimeout or more, and
// reports whether it did.
func (h *hub) evict() bool {
	for {
		h.mu.Lock()
		front := h.roomless.Front()
		if front == nil || time.Since(front.Value.(*session).since) < joinTimeout {
			h.mu.Unlock()
			return false
		}
		s := h.roomless.Remove(front).(*session) // so that no other handshake finds it
		s.roomless = nil
		h.mu.Unlock()
		if s.abort("forced server close") {
			return true
		}
	}
}

// stop has every later broadcast refused.
func (h *hub) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	h.caught.Broadcast()
}

// broadcast hands a message to its members on this node, and returns into how many queues it went. It never
// waits for a client, but for writeLarge if that is maxBatch behind: else large messages would pile up in
// the queues of those who do read.
func (h *hub) broadcast(m message) (delivered int, err error) {
	chat, named := m.rooms()
	var event *frame
	if len(chat) > 0 {
		event = newEvent(m.Event, m.data)
	}
	var small []*session                                // claimed, to be written to here
	defer func() { newWriter(false).writeAll(small) }() // deferred first: it runs behind the Unlock
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.behind >= maxBatch && !h.stopped && h.hasLarge(chat, named) {
		h.caught.Wait()
	}
	if h.stopped {
		return 0, errStopped
	}
	h.sequence++
	except := h.members[m.Except]
	behind := 0
	deliver := func(room map[*session]struct{}, f *frame, isChat bool) {
		isLarge := len(room) > largeRoom
		if isLarge {
			behind += f.cost()
		}
		for s := range room {
			again := s.last == h.sequence
			if s == except || isChat && again { // the chat's rooms come first: so it has the event
				continue
			}
			s.last = h.sequence
			kind := aBroadcast
			if again {
				kind = another
			}
			queued, claimed := s.push(f, kind)
			if queued {
				delivered++
			}
			switch {
			case claimed && isLarge:
				h.claimed = append(h.claimed, s)
			case claimed:
				small = append(small, s)
			}
		}
	}
	for _, name := range chat {
		deliver(h.rooms[name], event, true)
	}
	for _, channel := range named {
		room := h.rooms[channelRoom(channel)]
		if len(room) > 0 && !(m.Whisper && len(room) > maxWhispered) {
			deliver(room, newChannelEvent(channel, m.Event, m.data), false)
		}
	}
	if len(h.claimed) > 0 && !h.writing {
		h.writing = true
		go h.writeLarge()
	}
	if h.writing { // else nobody's wire was idle, and nobody waits for writeLarge
		h.behind += behind
	}
	h.deliveries.Add(int64(delivered))
	return delivered, nil
}

// hasLarge reports whether one of the rooms is large.
func (h *hub) hasLarge(chat, named []string) bool {
	isLarge := func(room string) bool { return len(h.rooms[room]) > largeRoom }
	return slices.ContainsFunc(chat, isLarge) ||
		slices.ContainsFunc(named, func(channel string) bool { return isLarge(channelRoom(channel)) })
}

// writeLarge writes to the claimed members of large rooms, until there are none. It is the one goroutine
// that does.
func (h *hub) writeLarge() {
	w := newWriter(false)
	var claimed []*session
	batch := 0 // of behind, that this round writes
	for {
		h.mu.Lock()
		h.behind -= batch
		h.caught.Broadcast()
		if len(h.claimed) == 0 {
			h.writing, h.behind = false, 0
			h.mu.Unlock()
			return
		}
		claimed, h.claimed = h.claimed, claimed[:0]
		batch = h.behind
		h.mu.Unlock()
		w.writeAll(claimed)
		clear(claimed) // no session is kept
	}
}

// frame is a message on its way: made once, and shared by all queues that it is in.
type frame struct {
	bytes   []byte       // as an unmasked WebSocket frame (RFC 6455, section 5.2)
	text    []byte       // its payload, an Engine.IO packet: what a poll gets
	holders atomic.Int32 // queues that it is in
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
	return &frame{bytes: b, text: b[len(header):]}
}

// newPacket returns an Engine.IO packet as a frame.
func newPacket(kind byte, format string, args ...any) *frame {
	return newFrame(websocket.TextMessage, fmt.Appendf([]byte{kind}, format, args...))
}

// newEvent returns a Socket.IO event ("2") in an Engine.IO message. The JSON goes in as it is.
func newEvent(name string, data []byte) *frame {
	return newPacket(messagePacket, "2[%s,%s]", quote(name), data)
}

// newChannelEvent returns an event of a channel, for those who have joined it by its name.
func newChannelEvent(channel, event string, data []byte) *frame {
	return newPacket(messagePacket, `2["broadcast",{"channel":%q,"event":%s,"data":%s}]`, channel, quote(event), data)
}

// quote returns a text as JSON.
func quote(text string) []byte {
	quoted, _ := json.Marshal(text) // always encodes
	return quoted
}

// Several daemons
//
// All daemons on one Redis subscribe to one channel, and a broadcast to any of them is published there and
// nowhere else. Its own daemon, too, delivers it when it comes back: hence the members on all nodes see the
// messages in one order, Redis's, and a message that Redis did not take is delivered to nobody.
//
// Anybody who can reach Redis can publish there. So a message is signed, and checked as a stranger's:
//
//	hex(HMAC-SHA256(secret, messagePrefix + all that follows this line)), by each secret, with a comma between
//	{"id", "channels", "except", "event", "whisper"}
//	the data, byte for byte
//
// In open mode the first line is empty.

// Redis may hang, and execute a PUBLISH only after Laravel was told 503 and has sent the message again. Then
// no node may be listening any more. Hence this timeline, from the moment in which Redis hangs:
//
//	0.20 s  publishConnect  a PUBLISH that has no connection by now is never sent
//	0.35 s  publishWrite    … and one that has not left, neither
//	1.75 s  redisSilence    each node gives up its subscription, on which a ping is answered every quarter of that
//	2.45 s  publishAnswer   the daemon gives up its PUBLISH, 2.1 s after it has left at the latest
//	2.50 s  publishTimeout  and has answered 503, whatever held it up: before the 3 s that the README's broadcaster waits
//
// The 350 ms behind redisSilence are for a node that is behind with delivering, and for go-redis's
// deadlines, which come up to 50 ms early. What this does not cover: only this node's way to Redis hangs,
// while the others listen on.
const (
	publishConnect = 200 * time.Millisecond
	publishWrite   = 150 * time.Millisecond
	redisSilence   = 1750 * time.Millisecond
	publishAnswer  = 2100 * time.Millisecond
	publishTimeout = 2500 * time.Millisecond

	redisRetry      = time.Second     // at most, between two attempts to subscribe
	refreshSpread   = 5 * time.Second // over which clients reconnect when their node may have missed something
	refreshInterval = time.Minute     // at least, from one to the next: Redis drops a node that is too slow again and again

	// messagePrefix is signed with each message. Its space keeps it apart from what a join signs,
	// socketId:channel.
	messagePrefix = "socketio redis 2\n"
	maxPublished  = maxBody + 64<<10 // bytes: the data, and 100 channels of 164
)

type cluster struct {
	server    *server
	redis     *redis.Client
	channel   string
	up        atomic.Bool
	nodes     atomic.Int64 // subscribers of the channel
	published sync.Map     // from the ID of a message on its way to the chan int that takes how often deliver delivered it
	refreshAt time.Time    // of the last refresh, or of the one to come; run's
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
	return &cluster{server: s, redis: redis.NewClient(options), channel: fmt.Sprintf("socketio:%d", options.DB)}
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

// subscribe delivers what is published, until the subscription is lost. If there was none for a while,
// messages of other nodes may have been missed: so all clients reconnect, and their pages fetch from Laravel
// what they don't have.
func (c *cluster) subscribe(ctx context.Context, lost bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer c.server.logPanic("redis subscription panicked") // go-redis's: an answer of types that it does not expect
	subscription := c.redis.Subscribe(ctx, c.channel)
	defer subscription.Close()
	if _, err := subscription.ReceiveTimeout(ctx, redisSilence); err != nil { // Redis's answer to SUBSCRIBE
		return err
	}
	if lost {
		c.refresh()
	}
	c.up.Store(true)
	c.server.log.Info("redis reached", "addr", c.redis.Options().Addr, "channel", c.channel)
	go c.pulse(ctx, func() error { return subscription.Ping(ctx) }) // so that a Redis that lives is never silent
	go c.pulse(ctx, func() error {                                  // not in the same goroutine: a late answer must not delay a ping
		n, err := c.redis.PubSubNumSub(ctx, c.channel).Result()
		if err == nil && ctx.Err() == nil {
			c.nodes.Store(n[c.channel])
		}
		return err
	})
	for {
		received, err := subscription.ReceiveTimeout(ctx, redisSilence)
		if err != nil {
			return err
		}
		switch received := received.(type) {
		case *redis.Message:
			c.deliver(received.Payload)
		case *redis.Subscription: // go-redis subscribes anew by itself where a Ping fails: the same loss
			return errors.New("the connection was lost")
		}
	}
}

// refresh has all clients reconnect: at once, or, after a recent refresh, refreshInterval later than that. A
// refresh that is still to come serves for this loss, too.
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
			time.AfterFunc(mathrand.N(refreshSpread), func() { v.(*session).end("forced server close") })
		}
	})
}

// pulse calls f every quarter of redisSilence, until ctx is done. What fails shows in the subscription.
func (c *cluster) pulse(ctx context.Context, f func() error) {
	tick := time.NewTicker(redisSilence / 4)
	defer tick.Stop()
	for ctx.Err() == nil {
		func() {
			defer c.server.logPanic("redis request panicked")
			_ = f()
		}()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// deliver delivers a message, whoever published it. Where writeLarge is behind, it waits, and so does
// whatever comes next.
func (c *cluster) deliver(payload string) {
	defer c.server.logPanic("redis message panicked")
	m, err := c.unseal(payload)
	if err != nil {
		c.server.log.Warn("redis message ignored: not from a daemon with this SOCKETIO_SECRET and version",
			"channel", c.channel, "error", err)
		return
	}
	delivered, _ := c.server.hub.broadcast(m)
	if result, ok := c.published.LoadAndDelete(m.ID); ok { // this node's own
		result.(chan int) <- delivered
	}
}

// unseal checks a message's signature, and then whether /broadcast could have sent it. Its errors quote none
// of it.
func (c *cluster) unseal(payload string) (m message, err error) {
	if len(payload) > maxPublished {
		return m, fmt.Errorf("it is over %d bytes", maxPublished)
	}
	signatures, signed, _ := bytes.Cut([]byte(payload), []byte("\n"))
	if !c.signed(signatures, signed) {
		return m, errors.New("its signature is missing or wrong")
	}
	header, data, _ := bytes.Cut(signed, []byte("\n"))
	if json.Unmarshal(header, &m) != nil || !utf8.Valid(header) || len(m.Channels) == 0 || len(m.Channels) > maxChannels {
		return m, errors.New("its header is none")
	}
	// Invalid UTF-8 in a text frame would close every member's WebSocket.
	m.data = data
	if len(data) > maxBody || !utf8.Valid(data) || !json.Valid(data) {
		return m, fmt.Errorf("data has to be JSON in UTF-8, of at most %d bytes", maxBody)
	}
	return m, m.check()
}

// signed reports whether one of the secrets has signed the message; in open mode, whether none has.
func (c *cluster) signed(signatures, text []byte) bool {
	if len(c.server.secrets) == 0 {
		return len(signatures) == 0
	}
	first, second, _ := bytes.Cut(signatures, []byte(","))
	prefix := []byte(messagePrefix)
	return c.server.signed(first, prefix, text) || c.server.signed(second, prefix, text)
}

// seal returns a message as it is published.
func (c *cluster) seal(m message) []byte {
	header, _ := json.Marshal(m) // strings always encode
	text := slices.Concat(header, []byte("\n"), m.data)
	return slices.Concat(bytes.Join(c.server.sign([]byte(messagePrefix), text), []byte(",")), []byte("\n"), text)
}

// publish sends a message to all nodes, and returns how many connections of this one took it, and how many
// nodes got it. It takes publishTimeout at most.
func (c *cluster) publish(m message) (delivered int, nodes int64, err error) {
	if c.server.stopping.Load() {
		return 0, 0, errStopped
	}
	if !c.up.Load() {
		return 0, 0, errNoRedis
	}
	m.ID = rand.Text()
	payload := c.seal(m)
	result := make(chan int, 1)
	c.published.Store(m.ID, result)
	defer c.published.Delete(m.ID)
	timeout := time.After(publishTimeout)
	answer := make(chan *redis.IntCmd, 1)
	go func() { // by itself: a greeting of Redis may take longer than publishTimeout, but nothing is sent after it
		defer c.server.logPanic("publish panicked")
		ctx, cancel := context.WithTimeout(context.Background(), publishConnect)
		defer cancel()
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
	}
	return delivered, nodes, nil
}

// publishWhisper sends a whisper to all nodes. What Redis does not take is lost.
func (c *cluster) publishWhisper(m message) {
	ctx, cancel := context.WithTimeout(context.Background(), publishConnect)
	defer cancel()
	defer c.server.logPanic("publish panicked")
	if c.up.Load() {
		_ = c.redis.Publish(ctx, c.channel, c.seal(m)).Err()
	}
}

// Sessions
//
// The library's Engine.IO server (v3.0.6) queues without bound for a client that does not read, takes a
// quick PONG for a missing one, and costs 9 KB more heap a client. Its Socket.IO part needs nothing of it
// but the methods of an engine.Socket (see Socket.IO below): so the sessions are our own.

// session is one client's Engine.IO session. All that goes to the client waits in its one queue: polls fetch
// it, or the wire takes it. An upgrade changes who empties the queue, and moves nothing.
type session struct {
	engine.Socket // nil: what Socket.IO does not ask for
	server        *server
	id            string // a secret of the client's: who has it can poll
	addr          string

	onData, onClose types.EventListener // Socket.IO's
	closing         sync.Once           // calls onClose

	receiving sync.Mutex  // held while a packet is handled: one at a time, whether a POST or the wire brings it
	bucket    time.Time   // under receiving: when a client that kept to messageRate would have sent all that came so far
	posting   atomic.Bool // a POST is under way

	// Under hub.mu.
	rooms    []string      // that its socket is in
	last     uint64        // number of the last broadcast that it got
	roomless *list.Element // among those in no room; nil: it is in one, or has closed
	since    time.Time     // it is in no room

	mu      sync.Mutex     // guards all that follows
	changed sync.Cond      // of mu: what a poll or handOver waits for may have come
	client  *socket.Socket // in the namespace; nil: it has not connected to it, or has left it
	state   state
	wire    *wire    // the WebSocket that carries the session; nil: its polls do
	probe   *wire    // the WebSocket that is tried, while polls carry the session
	queue   []*frame // what waits, the oldest first
	size    int      // bytes of it, by cost
	sent    int      // bytes of its first frame that the wire has taken
	full    bool     // the wire's socket is: drain waits for it
	writing bool     // claimed: somebody has the front of the queue on its way, to the wire or in a poll's answer
	polled  bool     // there is a poll: it waits, or its answer is leaving

	heart    *time.Timer // calls beat at deadline
	deadline time.Time   // for the client's PONG if one is due, else of the next PING
	ping     *frame      // the PING whose PONG is due; nil: none
	pinged   bool        // it has left, so that a PONG can answer it
}

// state says what a session does with its queue. It only grows. Whether polls or a WebSocket carry the
// session, wire says.
type state int

const (
	open   state = iota // takes frames; to ending by end, or where a queue is full or a write fails, and to closed by abort
	ending              // takes no more: what waits leaves, and end's last packet behind it; to closed by abort, soon
	closed              // has given its place back
)

// begin has Socket.IO listen, and then tells the client that the session is open.
func (s *session) begin(upgrades string) {
	socket.NewClient(s.server.sio, s)
	s.mu.Lock()
	s.deadline = time.Now().Add(s.server.pingInterval)
	s.heart = time.AfterFunc(s.server.pingInterval, s.beat)
	s.mu.Unlock()
	s.server.sessions.Store(s.id, s)
	s.server.hub.track(s)
	s.send(newPacket(openPacket, `{"maxPayload":%d,"pingInterval":%d,"pingTimeout":%d,"sid":%q,"upgrades":%s}`,
		maxMessage, s.server.pingInterval.Milliseconds(), s.server.pingTimeout.Milliseconds(), s.id, upgrades))
	if s.server.stopping.Load() { // since the request came
		s.end("server shutting down")
	}
}

func (s *session) isOpen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == open
}

// send puts a frame into the queue, and has it leave.
func (s *session) send(f *frame) {
	_, claimed := s.push(f, anAnswer)
	s.writeIf(claimed)
}

// frameKind says whom a frame owes its place in a queue to.
type frameKind int

const (
	anAnswer   frameKind = iota // to a message of the client's own
	aBroadcast                  // to Laravel, or who whispers
	another                     // copy, of a broadcast of which there is one in the queue already: that one was measured
)

// push puts a frame into the queue, and never blocks. queued: it leaves, unless the session ends at once.
// claimed: the wire was idle, and the caller has to write to it (writer.write).
func (s *session) push(f *frame, kind frameKind) (queued, claimed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != open {
		return false, false
	}
	if (kind != another || s.size > maxBacklog+maxCopies) && !s.fits(f, kind) {
		s.state = ending
		go s.cutOff("it does not read what waits for it") // not here: it takes the lock that a broadcast holds
		return false, false
	}
	s.enqueue(f)
	return true, s.claim()
}

// fits reports whether a frame may wait for this client. maxBacklog is the most. For who does not take what
// waits it is less, the more waits for all, as in a switch with a shared buffer: eight times what waits for
// one has to fit into what is left. With 1,000 clients that do not read, each of them has 64 KB. Anybody can
// make a client have answers, without a signature: so these leave half of all to broadcasts.
func (s *session) fits(f *frame, kind frameKind) bool {
	reads := s.wire != nil && !s.full || s.wire == nil && s.polled && s.size == 0
	if reads {
		return s.size < maxBacklog
	}
	left, least := maxWaiting-int(s.server.waiting.Load()), minBacklog
	if kind == anAnswer {
		left, least = left-maxWaiting/2, minBacklog/2
	}
	size := s.size
	if f.holders.Load() == 0 { // else it waits for others already
		size += f.cost()
	}
	return size <= least || s.size < maxBacklog && 8*size <= max(left, 0)
}

func (s *session) enqueue(f *frame) {
	s.queue = append(s.queue, f)
	s.size += f.cost()
	if f.holders.Add(1) == 1 {
		s.server.waiting.Add(int64(f.cost()))
	}
}

// claim wakes a poll that waits, or reports that the wire is idle and the caller's to write to.
func (s *session) claim() bool {
	s.changed.Broadcast()
	if s.wire == nil || s.writing || len(s.queue) == 0 {
		return false
	}
	s.writing = true
	return true
}

// wake has what waits leave, unless somebody sees to it already.
func (s *session) wake() {
	s.mu.Lock()
	claimed := s.claim()
	s.mu.Unlock()
	s.writeIf(claimed)
}

func (s *session) writeIf(claimed bool) {
	if claimed {
		newWriter(false).write(s)
	}
}

// drain goes on with a session's queue where a writer found the socket full.
func (s *session) drain() { newWriter(true).write(s) }

// writer writes queues to their sessions' wires, one after the other. What a socket does not take at once is
// left to a goroutine that waits for it (drain); only that one's writer waits.
type writer struct {
	waits  bool
	buffer []byte // several frames that leave in one system call

	// The system call under way. These are fields so that try need not be a new closure each time.
	try func(fd uintptr) (done bool)
	out []byte
	n   int // bytes that the socket took: none if it is full
	err error
}

func newWriter(waits bool) *writer {
	w := &writer{waits: waits}
	w.try = func(fd uintptr) bool {
		n, err := syscall.Write(int(fd), w.out)
		for err == syscall.EINTR {
			n, err = syscall.Write(int(fd), w.out)
		}
		if err == syscall.EAGAIN {
			return !w.waits // false: once more when the socket takes something
		}
		w.n, w.err = max(n, 0), err
		return true
	}
	return w
}

// writeAll writes to sessions that were claimed, and lets other goroutines run now and then: small rooms
// must not wait for a large one.
func (w *writer) writeAll(claimed []*session) {
	for i, s := range claimed {
		if i%64 == 63 {
			runtime.Gosched()
		}
		w.write(s)
	}
}

// write empties the queue of a session that was claimed into its wire, and gives the claim back.
func (w *writer) write(s *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue) > 0 { // it is empty once the session has closed
		w.load(s)
		if w.waits {
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
		case s.state == closed: // the loop ends
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.state = ending
			go s.cutOff("it took nothing for " + stallTimeout.String()) // not here: it takes the lock
			return
		case err != nil:
			s.state = ending
			go s.abort("transport error")
			return
		case w.n < len(w.out) && !w.waits:
			s.full = true
			go s.drain()
			return
		}
	}
	if w.waits {
		_ = s.wire.SetWriteDeadline(time.Time{}) // one that has passed fails even a write that need not wait
	}
	s.writing, s.full = false, false
}

// load takes the first frames of a session's queue as what is to be written, without what has left already.
func (w *writer) load(s *session) {
	first := s.queue[0].bytes
	n, size := 1, len(first)
	for n < len(s.queue) && size+len(s.queue[n].bytes) <= maxBatch {
		size += len(s.queue[n].bytes)
		n++
	}
	s.pinged = s.pinged || slices.Contains(s.queue[:n], s.ping)
	w.n, w.err, w.out = 0, nil, first[s.sent:]
	if n == 1 {
		return
	}
	w.buffer = append(w.buffer[:0], w.out...)
	for _, f := range s.queue[1:n] {
		w.buffer = append(w.buffer, f.bytes...)
	}
	w.out = w.buffer
}

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

// release takes the first frames out of the queue.
func (s *session) release(n int) {
	for _, f := range s.queue[:n] {
		s.size -= f.cost()
		if f.holders.Add(-1) == 0 {
			s.server.waiting.Add(int64(-f.cost()))
		}
	}
	s.queue = slices.Delete(s.queue, 0, n)
	if len(s.queue) == 0 && cap(s.queue) > 16 {
		s.queue = nil // a small array is kept for the next frames
	}
}

// beat sends a PING, or ends the session of a client that has not answered the last one.
func (s *session) beat() {
	s.mu.Lock()
	if time.Until(s.deadline) > 0 { // a PONG has come since the timer fired, and set it anew
		s.mu.Unlock()
		return
	}
	silent := s.ping != nil
	if s.state == open && !silent {
		s.ping = newPacket(pingPacket, "")
		s.enqueue(s.ping)
		s.deadline = s.deadline.Add(s.server.pingTimeout) // from when it was due: so does the client count
		s.heart.Reset(time.Until(s.deadline))
	}
	s.mu.Unlock()
	if silent {
		s.abort("ping timeout")
	} else {
		s.wake()
	}
}

// onPong notes that the client has answered a PING that has left.
func (s *session) onPong() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pinged && s.state == open {
		s.ping, s.pinged = nil, false
		s.deadline = time.Now().Add(s.server.pingInterval)
		s.heart.Reset(s.server.pingInterval)
	}
}

// gone reports whether the session has closed, or will within 10 ms because a PONG is overdue: the client
// measures the same time-out, and may be ahead.
func (s *session) gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state == closed || s.ping != nil && time.Until(s.deadline) < min(s.server.pingTimeout/20, 10*time.Millisecond)
}

// There are two ends, with Socket.IO's words for the reason: end, behind what waits, and abort, at once.

// end refuses what comes from here on, and ends the session behind what is on its way. Whatever has not left
// after closeTimeout is lost.
func (s *session) end(reason string) {
	s.mu.Lock()
	if s.state != open {
		s.mu.Unlock()
		return
	}
	s.state = ending
	switch {
	case s.wire != nil:
		s.enqueue(goingAway())
	case reason == clientClosed: // by polling; its last poll is let go
		s.enqueue(newPacket(noopPacket, ""))
	default:
		s.enqueue(newPacket(closePacket, ""))
	}
	s.mu.Unlock()
	s.wake()
	time.AfterFunc(closeTimeout, func() { s.abort(reason) })
	s.tellClosed(reason)
}

// clientClosed is the reason where the client has closed the connection.
const clientClosed = "transport close"

// abort ends the session at once and gives its place back, and reports whether it was this call that did.
// Whatever has not left is lost.
func (s *session) abort(reason string) bool {
	s.mu.Lock()
	if s.state == closed {
		s.mu.Unlock()
		return false
	}
	s.state = closed
	s.release(len(s.queue))
	s.heart.Stop()
	s.changed.Broadcast()
	for _, w := range []*wire{s.wire, s.probe} {
		if w != nil {
			w.Close()
		}
	}
	s.mu.Unlock()
	s.server.sessions.Delete(s.id)
	s.server.connections.Add(-1)
	s.tellClosed(reason)
	s.server.hub.track(s)
	return true
}

// cutOff aborts the session of a client that does not read. What the kernel holds for it goes too.
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
		s.abort("transport error")
	}
}

// tellClosed tells Socket.IO and the log that the session ends, once. For who is in the namespace,
// onConnection's listener writes the line.
func (s *session) tellClosed(reason string) {
	s.closing.Do(func() {
		s.mu.Lock()
		client := s.client
		s.mu.Unlock()
		if client == nil {
			s.server.log.Debug("disconnected", "id", "", "addr", s.addr, "reason", reason)
		}
		s.onClose(reason)
	})
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
		return binaryPacket, nil, nil
	case len(packet) > 0 && openPacket <= packet[0] && packet[0] <= noopPacket:
		return packet[0], packet[1:], nil
	}
	return 0, nil, errors.New("invalid packet")
}

// Polling: each GET waits for packets, each POST brings some.

var (
	errOverlap  = errors.New("two polls at once")
	errUpgraded = errors.New("this session has left polling")
)

func (s *session) poll(w http.ResponseWriter, r *http.Request) {
	r.Header, r.URL = nil, nil // net/http has read them, nobody does any more, and the poll may wait for long
	packets, last, err := s.fetch(r.Context())
	if err != nil {
		if err != errUpgraded { // a second poll at once, or the client went away: both end the session
			s.abort("transport error")
		}
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(pollTimeout)) // an error shows up in Flush
	size, end := answerPoll(w, packets)
	s.mu.Lock()
	s.took(size)
	s.writing, s.polled = false, false // only now: else any number of answers could be under way that the client does not read
	s.mu.Unlock()
	if last {
		s.abort(clientClosed)
	}
	w.Write(end) // and not before all that: the client's next request may follow at once
	err = control.Flush()
	_ = control.SetWriteDeadline(time.Time{})
	if err != nil {
		s.abort("transport error")
	}
	s.wake() // an upgrade may have come meanwhile
}

// answerPoll writes packets as one payload, but for its end. It returns how many bytes their frames have.
func answerPoll(w http.ResponseWriter, packets []*frame) (size int, end []byte) {
	length := len(packets) - 1
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
			w.Write(end)
			w.Write([]byte{0x1e})
		}
		w.Write(f.text[:len(f.text)-1])
		end = f.text[len(f.text)-1:]
	}
	return size, end
}

// fetch waits for something to send, and returns it; last says that the session ends with it. It stays in
// the queue until it has left.
func (s *session) fetch(ctx context.Context) (packets []*frame, last bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.polled {
		return nil, false, errOverlap
	}
	s.polled = true
	came := time.Now()
	timer := time.AfterFunc(upgradeDelay, s.wake) // see released
	defer timer.Stop()
	stop := context.AfterFunc(ctx, s.wake)
	defer stop()
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

// released reports whether a poll is to be answered with NOOP: the client's probe works, and the client
// sends UPGRADE only when no poll is under way. A poll that has just come may have overtaken the UPGRADE: it
// waits for that.
func (s *session) released(came time.Time) bool {
	return s.probe != nil && s.probe.answered && time.Since(came) >= upgradeDelay
}

func (s *session) post(w http.ResponseWriter, r *http.Request) {
	if status, err := s.readPost(w, r); err != nil {
		s.abort("transport error")
		http.Error(w, err.Error(), status)
		return
	}
	w.Header().Set("Content-Type", "text/html") // as Node has it: some browsers offer text/plain as a download
	w.WriteHeader(http.StatusOK)
	io.WriteString(w, "ok")
}

// readPost handles the packets of a POST. Its error, which ends the session, comes with the status to refuse
// the POST with.
func (s *session) readPost(w http.ResponseWriter, r *http.Request) (status int, err error) {
	if s.posting.Swap(true) { // any number of them could be under way, each with its body
		return http.StatusBadRequest, errors.New("two posts at once")
	}
	defer s.posting.Store(false)
	body, status, err := readBody(w, r, maxPost)
	if err != nil {
		return status, err
	}
	if !utf8.Valid(body) { // others may get what it says
		return http.StatusBadRequest, errors.New("the body is not UTF-8")
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
		if kind == closePacket { // it may have overtaken the client's last poll, which is on another connection
			s.end(clientClosed)
			break
		}
		s.onPacket(kind, text)
	}
	return 0, nil
}

// WebSocket

// wire is a client's WebSocket, which gorilla/websocket reads. That writes nothing but the handshake, and a
// last close frame to a client that breaks the protocol: the rest goes through the session's queue.
type wire struct {
	*net.TCPConn
	session  *session
	ws       *websocket.Conn
	raw      syscall.RawConn // to write to it
	answered bool            // under session.mu: it is a probe that works

	// The reader's.
	probing bool
	bytes   int // read of a message. There may be any number of empty frames, which gorilla/websocket does not show
}

var errTooFast = errors.New("too many frames")

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.TCPConn.Read(b)
	w.bytes += n
	if w.bytes > maxUnread {
		w.session.endTooFast()
		return 0, errTooFast
	}
	return n, err
}

// Write writes a frame by way of the session's queue; the answer to the handshake, and to a probe, past it:
// polls still empty that.
func (w *wire) Write(b []byte) (int, error) {
	if w.ws == nil || w.probing {
		return w.TCPConn.Write(b)
	}
	w.session.send(&frame{bytes: bytes.Clone(b)})
	return len(b), nil
}

// Close closes the connection, if the handshake has brought one.
func (w *wire) Close() error {
	if w.TCPConn == nil {
		return nil
	}
	return w.TCPConn.Close()
}

// hijacker gives gorilla/websocket a wire in place of the connection that it takes over.
type hijacker struct {
	http.ResponseWriter
	wire *wire
}

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffers, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	s := h.wire.session
	s.mu.Lock() // abort may look for what it has to close
	defer s.mu.Unlock()
	h.wire.TCPConn = conn.(*net.TCPConn) // the listener is TCP's
	return h.wire, buffers, nil
}

// accept answers a WebSocket handshake. Of subprotocols it takes the first, as Node's ws does: a browser
// that offered some and gets none fails the connection.
func (w *wire) accept(rw http.ResponseWriter, r *http.Request) error {
	header := http.Header{}
	if protocols := websocket.Subprotocols(r); len(protocols) > 0 {
		header.Set("Sec-WebSocket-Protocol", protocols[0])
	}
	ws, err := w.session.server.upgrader.Upgrade(hijacker{rw, w}, r, header)
	if err != nil {
		return err
	}
	w.ws = ws
	w.raw, _ = w.SyscallConn() // fails for nil alone
	ws.SetReadLimit(maxMessage)
	ws.SetPingHandler(func(data string) error { return w.onControl(newFrame(websocket.PongMessage, []byte(data))) })
	ws.SetPongHandler(func(string) error { return w.onControl(nil) })
	ws.SetCloseHandler(func(code int, _ string) error {
		payload := []byte{}
		if code != websocket.CloseNoStatusReceived {
			payload = websocket.FormatCloseMessage(code, "")
		}
		return w.onControl(newFrame(websocket.CloseMessage, payload))
	})
	return nil
}

// onControl answers a control frame of WebSocket's own, if there is an answer.
func (w *wire) onControl(answer *frame) error {
	size := w.bytes
	w.bytes = 0
	if !w.session.admit(size) {
		return errTooFast
	}
	if answer == nil {
		return nil
	}
	_, err := w.Write(answer.bytes)
	return err
}

// upgrade serves the WebSocket handshake of a client that polls. A second WebSocket, or one for a session
// that has upgraded or is ending, is accepted and then closed: Engine.IO's public test suite takes a refused
// handshake for an error.
func (s *session) upgrade(rw http.ResponseWriter, r *http.Request) {
	w := &wire{session: s, probing: true}
	s.mu.Lock()
	free := s.state == open && s.wire == nil && s.probe == nil
	if free {
		s.probe = w // before the handshake is answered: the next may follow at once
	}
	s.mu.Unlock()
	err := w.accept(rw, r)
	deadline := time.Now().Add(upgradeTimeout)
	switch {
	case err == nil && free && s.isOpen():
		_ = w.SetDeadline(deadline)
		go s.read(w)
	case free:
		s.detach(w)
	default:
		w.Close()
	}
}

// read handles what the client sends on a wire, until it ends. It is a goroutine of its own, which waits in
// as few and small frames as can be: so Go takes back the half of its stack that a message has needed, 4 KB
// a client.
func (s *session) read(w *wire) {
	defer s.detach(w)
	defer s.server.logPanic("reading from a client failed")
	for {
		messageType, reader, err := w.ws.NextReader()
		if err == nil {
			err = s.handle(w, messageType, reader)
		}
		if err == errTooFast {
			<-time.After(closeTimeout) // it is not read any more, and has this long to read why
		}
		if err != nil {
			return
		}
	}
}

// handle handles a message of the client's. Its error ends the wire.
func (s *session) handle(w *wire, messageType int, reader io.Reader) error {
	kind, text, err := w.next(messageType, reader)
	switch {
	case err != nil:
		return err
	case w.probing && kind == pingPacket && string(text) == "probe":
		if _, err := w.Write(newPacket(pongPacket, "probe").bytes); err != nil {
			return err
		}
		s.mu.Lock()
		w.answered = true
		s.mu.Unlock()
		s.wake()
	case w.probing && kind == upgradePacket:
		s.attach(w)
	case w.probing:
		return errors.New("a probe only probes")
	case kind == closePacket:
		s.end(clientClosed) // the client's close frame is still to come, and would meet a closed socket
	default:
		s.onPacket(kind, text)
	}
	return nil
}

// next returns the packet in a message that has begun.
func (w *wire) next(messageType int, reader io.Reader) (kind byte, text []byte, err error) {
	if !w.probing { // which has upgradeTimeout for all
		_ = w.SetReadDeadline(time.Now().Add(messageTimeout))
		defer w.SetReadDeadline(time.Time{})
	}
	text, err = io.ReadAll(reader)
	if err != nil {
		return 0, nil, err
	}
	if messageType == websocket.TextMessage && !utf8.Valid(text) { // RFC 6455, section 8.1
		invalid := websocket.FormatCloseMessage(websocket.CloseInvalidFramePayloadData, "")
		_ = w.ws.WriteControl(websocket.CloseMessage, invalid, time.Now().Add(closeTimeout))
		return 0, nil, errors.New("a text that is not UTF-8")
	}
	size := max(len(text), w.bytes)
	w.bytes = 0
	if !w.session.admit(size) {
		return 0, nil, errTooFast
	}
	if messageType == websocket.BinaryMessage {
		return binaryPacket, nil, nil
	}
	return decodePacket(text)
}

// attach has the wire carry everything from here on: the client has sent UPGRADE on it.
func (s *session) attach(w *wire) {
	_ = w.SetDeadline(time.Time{})
	w.probing = false
	s.mu.Lock()
	s.wire, s.probe = w, nil
	if s.state == ending { // since the client's last poll
		s.enqueue(goingAway())
	}
	s.mu.Unlock()
	s.wake()
}

// detach ends the session if the wire carried it. A probe that came to nothing is forgotten: the next may
// try.
func (s *session) detach(w *wire) {
	w.Close()
	s.mu.Lock()
	carried := s.wire == w
	if s.probe == w {
		s.probe = nil
	}
	s.mu.Unlock()
	if carried {
		s.abort(clientClosed)
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

// What clients send

// admit reports whether the client keeps to messageRate with one more packet, or WebSocket frame of any
// kind, of so many bytes: each KiB counts as one more, for what it takes to read them. If not, its session
// ends.
func (s *session) admit(size int) bool {
	const cost = time.Second / messageRate
	s.receiving.Lock()
	if full := time.Now().Add(-messageBurst * cost); s.bucket.Before(full) {
		s.bucket = full
	}
	s.bucket = s.bucket.Add(time.Duration(1+size>>10) * cost)
	admitted := time.Until(s.bucket) <= 0
	s.receiving.Unlock()
	if !admitted {
		s.endTooFast()
	}
	return admitted
}

// endTooFast ends the session of a client that sends too much, and tells it so.
func (s *session) endTooFast() {
	s.server.log.Warn("client ended: it sends too many messages", "addr", s.addr)
	s.send(newEvent("error", fmt.Appendf(nil, `{"message":"too many messages: at most %d a second"}`, messageRate)))
	s.end("forced server close")
}

// onPacket handles a client's packet of Engine.IO's, which admit has let in.
func (s *session) onPacket(kind byte, text []byte) {
	s.receiving.Lock()
	defer s.receiving.Unlock()
	switch {
	case !s.isOpen():
	case kind == pongPacket:
		s.onPong()
	case kind == pingPacket: // the server's part since protocol 4
		s.abort("parse error")
	case kind == messagePacket:
		s.onMessage(text)
	case kind == binaryPacket: // not supported
		s.end("parse error")
	}
}

// Socket.IO: the seam to the library
//
// The library has the namespace: who has connected to it, under which id. Events go past it, and nothing
// that a client wrote goes to it but the fact of a CONNECT or a DISCONNECT. What v3.0.6 gets wrong, and what
// answers it here:
//
//   - Its parser decodes any JSON into anything. For numbers near zero Go takes 5 ms a KiB, and 16 KiB of brackets are a
//     megabyte. So onMessage takes packets apart, and no further than an event needs.
//   - It handles a socket's packets in a queue of their own, CONNECT and DISCONNECT too. handOver waits for it: else a client
//     that leaves and comes back in one go is closed, and two CONNECTs at once leave a socket behind.
//   - It acknowledges a CONNECT before it knows the socket, and would close the connection of a client that answers at once.
//     So Write drops what it writes, and onConnection acknowledges.
//   - It keeps the request and its headers with each socket, 4 KB. So all share an empty request, and Handshake is emptied.
//   - A session that closes while it connects is cleaned up before there is anything to clean. onConnection looks again.
//   - disconnect fires twice where a DISCONNECT meets a close. The listener is there once, and DelAll does nothing twice.

func (s *session) Id() string                                               { return s.id }
func (s *session) Protocol() int                                            { return 4 }
func (s *session) Request() *types.HttpContext                              { return s.server.request }
func (s *session) RemoteAddress() string                                    { return s.addr }
func (s *session) RemoveListener(types.EventName, types.EventListener) bool { return false }

func (s *session) ReadyState() string {
	if s.isOpen() {
		return "open"
	}
	return "closed"
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

// Write drops a packet of the library's: the only one is the acknowledgement of a CONNECT.
func (s *session) Write(io.Reader, *packet.Options, engine.SendCallback) engine.Socket { return s }

// Close ends the session of who has not sent CONNECT within connectTimeout.
func (s *session) Close(bool) { s.end("forced server close") }

// Socket.IO's packet types (protocol 5).
const (
	connectPacket    = '0'
	disconnectPacket = '1'
	eventPacket      = '2'
	ackPacket        = '3'
)

// onMessage takes a packet of Socket.IO's apart: a type, the namespace and a comma unless it is /, the
// number of an acknowledgement, and JSON.
func (s *session) onMessage(text []byte) {
	if len(text) == 0 {
		s.end("parse error")
		return
	}
	kind, rest, namespace := text[0], text[1:], []byte("/")
	if bytes.HasPrefix(rest, namespace) {
		namespace, rest, _ = bytes.Cut(rest, []byte(","))
	}
	payload := bytes.TrimLeft(rest, "0123456789")
	number := rest[:len(rest)-len(payload)]
	s.mu.Lock()
	client := s.client
	s.mu.Unlock()
	switch {
	case len(number) > maxNumber || len(namespace) > maxNamespace:
		s.end("parse error")
	case kind == connectPacket && string(namespace) != "/":
		s.send(newPacket(messagePacket, `4%s,{"message":"Invalid namespace"}`, namespace)) // a CONNECT_ERROR
	case kind == connectPacket && client == nil:
		s.handOver(kind, true)
	case string(namespace) != "/" || client == nil:
		s.end("parse error")
	case kind == disconnectPacket:
		s.handOver(kind, false)
	case kind == eventPacket:
		s.onEvent(client.Id(), number, payload)
	case kind == ackPacket && bytes.HasPrefix(payload, []byte("[")): // of nothing: no event here asks for one
	default: // also binary events: not supported
		s.end("parse error")
	}
}

// handOver gives the library a CONNECT or a DISCONNECT, and waits until its queue is through with it, or the
// session ends.
func (s *session) handOver(kind byte, connects bool) {
	s.onData(types.NewStringBuffer([]byte{kind}))
	s.mu.Lock()
	defer s.mu.Unlock()
	for (s.client != nil) != connects && s.state == open {
		s.changed.Wait()
	}
}

// onConnection runs when the library knows the client's socket. It acknowledges the CONNECT.
func (s *server) onConnection(args ...any) {
	client := args[0].(*socket.Socket)
	session := client.Conn().(*session)
	*client.Handshake() = socket.Handshake{}
	s.hub.enter(client.Id(), session)
	s.log.Debug("connected", "id", client.Id(), "addr", session.addr)
	_ = client.Once("disconnect", func(reason ...any) {
		s.log.Debug("disconnected", "id", client.Id(), "addr", session.addr, "reason", reason[0])
		session.setClient(nil)
	})
	session.send(newPacket(messagePacket, `0{"sid":%q}`, client.Id()))
	session.setClient(client)
	if !session.isOpen() {
		s.hub.DelAll(client.Id())
		client.Nsp().Remove(client)
	}
}

// setClient notes that the client has connected to the namespace, or left it.
func (s *session) setClient(client *socket.Socket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.client = client
	s.changed.Broadcast()
}

// Events

// argument has the fields of an event's argument that something here reads, each as it came.
type argument struct {
	SessionID json.RawMessage `json:"sessionId"`
	UserType  json.RawMessage `json:"userType"`
	Channel   json.RawMessage `json:"channel"`
	Event     json.RawMessage `json:"event"`
	Data      json.RawMessage `json:"data"`
	Auth      json.RawMessage `json:"auth"`
}

// parseArgument reads an event's first argument.
func parseArgument(raw json.RawMessage) (arg *argument, isObject bool) {
	arg = new(argument)
	isObject = bytes.HasPrefix(raw, []byte("{")) && json.Unmarshal(raw, arg) == nil
	return arg, isObject
}

// text returns a JSON string's text; of anything else, nothing.
func text(raw json.RawMessage) (s string) {
	_ = json.Unmarshal(raw, &s)
	return s
}

// onEvent handles an event, a list of its name and its arguments, and answers it. Where the client asks for
// an acknowledgement, by a number, it gets the same answer too.
func (s *session) onEvent(id socket.SocketId, number, payload []byte) {
	var event [2]json.RawMessage // encoding/json skips what comes behind them
	if json.Unmarshal(payload, &event) != nil || !bytes.HasPrefix(event[0], []byte(`"`)) || socket.SOCKET_RESERVED_EVENTS.Has(text(event[0])) {
		s.end("parse error")
		return
	}
	name := text(event[0])
	answer, reply, err := s.handleEvent(id, name, event[1])
	if err != nil {
		s.server.log.Debug("refused", "id", id, "event", fmt.Sprintf("%.100s", name), "error", err)
		s.reply("error", fmt.Appendf(nil, `{"message":%s}`, quote(err.Error())), nil)
		answer, reply = "", fmt.Appendf(nil, `{"error":%s}`, quote(err.Error()))
	}
	s.reply(answer, reply, number)
}

// reply sends an event, unless its name is empty, and an acknowledgement, if there is a number for one.
func (s *session) reply(event string, data, number []byte) {
	if event != "" {
		s.send(newEvent(event, data))
	}
	if len(number) > 0 {
		s.send(newPacket(messagePacket, "3%s[%s]", number, data))
	}
}

// handleEvent does what an event asks for, and returns the event that answers it. Its error is a sentence
// for the front end's author.
func (s *session) handleEvent(id socket.SocketId, name string, raw json.RawMessage) (answer string, reply []byte, err error) {
	arg, isObject := parseArgument(raw)
	var p target
	switch name {
	case "ping":
		return "pong", fmt.Appendf(nil, `{"timestamp":%q}`, timestamp()), nil
	case "whisper":
		return "", []byte("{}"), s.whisper(id, arg)
	case "join-session", "leave-session":
		if !isObject {
			return "", nil, fmt.Errorf("%s wants an object {sessionId}", name)
		}
		p, err = sessionTarget(arg)
	case "join-admin", "leave-admin":
		p = target{room: adminRoom, signedName: "admin-chat", joined: "joined-admin", left: "left-admin", reply: []byte(`{"room":"admin-room"}`)}
		if isNothing := len(raw) == 0 || string(raw) == "null"; name == "join-admin" && !isObject && !isNothing {
			err = errors.New("join-admin takes nothing, or an object {auth}")
		}
	case "join", "leave":
		p, err = channelTarget(text(arg.Channel))
	default:
		err = fmt.Errorf("unknown event %.100q: there are join-session, join-admin, leave-session, leave-admin, join, leave, whisper and ping", name)
	}
	if err != nil {
		return "", nil, err
	}
	if strings.HasPrefix(name, "leave") {
		s.server.hub.leave(id, p.room)
		return p.left, p.reply, nil
	}
	return p.joined, p.reply, s.join(id, p, arg)
}

// target is what an event wants to join or leave.
type target struct {
	room         string
	signedName   string // what Laravel signs
	joined, left string // the events that answer
	reply        []byte // and what they carry, as JSON
}

// sessionTarget returns a chat session's. Its id is a text, or an integer by its characters: 5 and "5" are
// one session.
func sessionTarget(arg *argument) (target, error) {
	id := text(arg.SessionID)
	if strings.Trim(string(arg.SessionID), "0123456789-") == "" { // an integer; what is not there is no id either
		id = string(arg.SessionID)
	}
	if !isSessionID(id) {
		return target{}, errSessionID
	}
	reply := fmt.Appendf(nil, `{"roomName":%q,"sessionId":%s}`, sessionRoom(id), arg.SessionID) // as it came
	return target{room: sessionRoom(id), signedName: "chat-session." + id, joined: "joined-session", left: "left-session", reply: reply}, nil
}

// channelTarget returns a channel's, by its name.
func channelTarget(name string) (target, error) {
	p := target{room: channelRoom(name), signedName: name, joined: "joined", left: "left", reply: fmt.Appendf(nil, `{"channel":%q}`, name)}
	channel, err := parseChannel(name)
	switch {
	case err != nil:
		return p, err
	case channel.rooms != nil && channel.prefix != "private-":
		return p, fmt.Errorf("join %s by the name private-%s, or send join-session or join-admin", name, channel.plain)
	case channel.rooms != nil:
		p.signedName = channel.plain // as for join-session and join-admin
	case channel.prefix == "presence-":
		return p, errors.New("presence channels are not supported: nobody learns who is present; take a private channel")
	}
	return p, nil
}

// join puts the client into a room, if Laravel has signed that.
func (s *session) join(id socket.SocketId, p target, arg *argument) error {
	userType := cmp.Or(string(arg.UserType), "null")
	if !slices.Contains([]string{"null", `"guest"`, `"admin"`}, userType) {
		return errors.New(`userType has to be "guest" or "admin"`)
	}
	if err := s.server.verifyJoin(id, p.signedName, arg.Auth); err != nil {
		return err
	}
	if !s.server.hub.join(id, p.room) {
		return fmt.Errorf("a connection may be in at most %d sessions and channels: leave one first", maxRooms)
	}
	s.server.log.Debug("joined", "id", id, "room", p.room, "user_type", text(arg.UserType))
	return nil
}

// whisper sends what a member of a private channel says to the other members, past Laravel.
func (s *session) whisper(id socket.SocketId, arg *argument) error {
	channel := text(arg.Channel)
	m := message{Channels: []string{channel}, Except: id, Event: "client-" + text(arg.Event), Whisper: true, data: arg.Data}
	if m.data == nil {
		m.data = []byte("{}")
	}
	members, joined := s.server.hub.size(channelRoom(channel), id)
	switch {
	case !joined || !strings.HasPrefix(channel, "private-"):
		return fmt.Errorf("whisper is for members of a private channel: join %.164q first", channel)
	case members > maxWhispered:
		return fmt.Errorf("whisper is for channels of at most %d members", maxWhispered)
	case text(arg.Event) == "":
		return errors.New("whisper wants an event, such as typing")
	}
	if err := m.check(); err != nil {
		return err
	}
	select {
	case s.server.whispers <- m:
	default: // lost
	}
	return nil
}

// sendWhispers sends whispers, one after the other: so they stay in order, and all of them together take one
// turn beside Laravel's broadcasts.
func (s *server) sendWhispers(ctx context.Context) {
	for {
		select {
		case m := <-s.whispers:
			if s.cluster != nil {
				s.cluster.publishWhisper(m)
			} else {
				_, _ = s.hub.broadcast(m)
			}
		case <-ctx.Done():
			return
		}
	}
}

// verifyJoin checks Laravel's signature of this connection's id and the channel, in secured mode.
func (s *server) verifyJoin(id socket.SocketId, channel string, auth json.RawMessage) error {
	if len(s.secrets) == 0 {
		return nil
	}
	if !bytes.HasPrefix(auth, []byte(`"`)) {
		return fmt.Errorf("auth is missing: ask Laravel's /broadcasting/auth to sign socket_id %s for channel %s", id, channel)
	}
	if !s.signed([]byte(text(auth)), []byte(string(id)+":"+channel)) {
		return fmt.Errorf("auth does not sign socket_id %s for channel %s: ask Laravel anew at each connect, "+
			"and check that both sides have the same SOCKETIO_SECRET", id, channel)
	}
	return nil
}

// sign returns a text's signature by each secret: while it changes, a daemon with new,old understands those
// with either, and is understood by them.
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

// The door: who may open a session

// handleSocketIO serves Engine.IO (protocol 4): handshakes, upgrades, polls and posts.
func (s *server) handleSocketIO(w http.ResponseWriter, r *http.Request) {
	if len(r.URL.RawQuery) > maxQuery {
		refuseEngine(w, 3, "Bad request")
		return
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
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
	isPoll, isWebSocket := query.Get("transport") == "polling", query.Get("transport") == "websocket"
	isUpgrade := isWebSocket && websocket.IsWebSocketUpgrade(r)
	v, _ := s.sessions.Load(sid)
	session, _ := v.(*session)
	switch {
	case err != nil: // nginx, which counts handshakes by their query, might read it in another way
		refuseEngine(w, 3, "Bad request")
	case !isPoll && !isWebSocket:
		refuseEngine(w, 0, "Transport unknown")
	case sid == "" && r.Method != http.MethodGet:
		refuseEngine(w, 2, "Bad handshake method")
	case sid == "" && !isPoll && !isUpgrade:
		refuseEngine(w, 3, "Bad request")
	case sid == "" && query.Get("EIO") != "4":
		refuseEngine(w, 5, "Unsupported protocol version")
	case sid == "":
		s.handshake(w, r, isPoll)
	case session == nil || session.gone():
		refuseEngine(w, 1, "Session ID unknown")
	case isUpgrade:
		session.upgrade(w, r)
	case isPoll && r.Method == http.MethodGet && !session.upgraded():
		session.poll(w, r)
	case isPoll && r.Method == http.MethodPost && !session.upgraded():
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
		// An <img> on anybody's page would open sessions. Socket.IO's client sends Origin to another site,
		// by each transport.
		http.Error(w, "pages of other sites connect with an Origin", http.StatusForbidden)
		return false
	case origin == "": // not a browser, or a poll of the server's own page
	case s.allows(origin, r):
		// Not a literal *, with which clients that set withCredentials (for a proxy's sticky cookie) fail.
		// No cookie counts here.
		w.Header().Set("Access-Control-Allow-Origin", origin)
		w.Header().Set("Access-Control-Allow-Credentials", "true")
	default:
		s.log.Warn("origin refused: add it to CORS_ORIGINS if it is yours", "origin", fmt.Sprintf("%.100s", origin), "addr", clientAddr(r))
		http.Error(w, "this origin is not in CORS_ORIGINS", http.StatusForbidden)
		return false
	}
	return true
}

// allows reports whether CORS_ORIGINS has a request's origin, or it is the server's own: React Native and
// python-socketio send that, and so do pages of the same site.
func (s *server) allows(origin string, r *http.Request) bool {
	if slices.Contains(s.origins, "*") {
		return true
	}
	if len(origin) > maxOrigin {
		return false
	}
	origin = canonicalOrigin(origin)
	scheme, host, _ := strings.Cut(origin, "://")
	// Host has no scheme, and so no default port. In open mode nothing else would stop a page whose name has
	// been rebound to 127.0.0.1, which makes it the server's own.
	if origin == canonicalOrigin(scheme+"://"+r.Host) && (len(s.secrets) > 0 || hasLoopbackHost(r)) {
		return true
	}
	return slices.ContainsFunc(s.origins, func(allowed string) bool {
		before, domain, wildcard := strings.Cut(allowed, "*") // https:// and .example.com
		subdomain, ok := strings.CutSuffix(host, domain)
		return allowed == origin || wildcard && before == scheme+"://" && ok && subdomain != "" && !strings.ContainsAny(subdomain, "/:@")
	})
}

// refuseEngine answers with one of Engine.IO's errors.
func refuseEngine(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprintf(w, `{"code":%d,"message":%q}`, code, message)
}

// handshake serves a request that opens an Engine.IO session.
func (s *server) handshake(w http.ResponseWriter, r *http.Request, isPoll bool) {
	if s.connections.Add(1) > int64(s.maxConnections) && !s.hub.evict() {
		s.connections.Add(-1)
		s.log.Warn("connection refused: MAX_CONNECTIONS are open", "max_connections", s.maxConnections)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	session := &session{server: s, id: rand.Text(), addr: clientAddr(r)}
	session.changed.L = &session.mu
	if isPoll {
		session.begin(`["websocket"]`)
		session.poll(w, r)
		return
	}
	wire := &wire{session: session}
	if err := wire.accept(w, r); err != nil {
		s.connections.Add(-1)
		return
	}
	session.wire = wire
	session.begin(`[]`)
	go session.read(wire)
}
