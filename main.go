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
// queue. The Socket.IO library only gives a client its id (newID). Whispers go on by a queue of their own
// (sendWhispers) to hub.broadcast, or to Redis.
//
// Goroutines:
//   - main's, which waits for the end
//   - net/http's: Serve, and one for each connection that polls, posts or broadcasts
//   - cluster.run, which reads the streams
//   - sendWhispers
//   - hub.writeLarge, which writes to the large rooms, while there is something to write
//   - session.read, for each WebSocket; session.drain, for a client while its socket is full; giveBack, at a
//     session's end, which closes its connections
//   - supervise, which tells systemd, and net/http's for its requests
//   - the library's queue, while newID waits for it; go-redis's, which dial
//
// Heartbeats, the time-out for CONNECT, ends that wait, polls that wait for an upgrade, refreshes and links that
// close are timers.
//
// Whoever puts a frame into the queue of an idle WebSocket writes it, whichever goroutine or timer that is; but to
// large rooms writeLarge does, and where a socket is full, drain.
//
// Locks, in the order in which they are taken: session.receiving, hub.mu, session.mu, and the log's. What each
// guards stands where it is declared. While hub.mu or session.mu is held, nothing is written to a client.
package main

import (
	"bufio"
	"bytes"
	"cmp"
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
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/zishang520/socket.io/parsers/engine/v3/packet"
	"github.com/zishang520/socket.io/servers/engine/v3"
	"github.com/zishang520/socket.io/servers/socket/v3"
	"github.com/zishang520/socket.io/v3/pkg/types"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// version is stamped by the build: go build -ldflags "-X main.version=1.2.3".
var version = "dev"

// The limits, in the order of the README's table, each with its reason and the function that uses it. Redis's
// are at the head of that section.
const (
	// Who may be here.
	joinTimeout    = time.Second      // when all places are taken, a newcomer displaces who has been in no room for so long (displace)
	connectTimeout = 10 * time.Second // from the handshake to Socket.IO's CONNECT, which a client sends at once (begin)
	upgradeTimeout = 10 * time.Second // for a client that polls to try its WebSocket and upgrade to it (upgrade)
	maxHeader      = 16 << 10         // bytes of a request's header: it is the cookies, of 4 KiB each at most (newServer)
	minSecret      = 32               // characters: any visitor has a signature to try guesses on, offline (loadConfig)
	maxOrigin      = 300              // bytes of an Origin: a name has 253 at most (allows)
	maxQuery       = 4 << 10          // bytes of a query: front ends put tokens there. Go takes 60 µs a KiB (handleSocketIO)
	reservedFiles  = 64               // open files that are no client's: Redis, the self-check, Laravel's requests (limitConnections)

	// What a client may send.
	maxRooms       = 100              // session rooms and channels of one client: an admin with a hundred chats open (join)
	maxMessage     = 16 << 10         // bytes of a message: it only joins, leaves, whispers and pings (accept, readPost)
	maxPost        = 4 * maxMessage   // bytes of a POST: clients before 4.5 post all that they have, say 100 joins of 300 bytes (readPost)
	maxNumber      = 16               // digits of an acknowledgement's number: it is sent back (onMessage)
	maxNamespace   = 100              // bytes of another namespace's name: it is sent back, too (onMessage)
	maxUnread      = 2 * maxMessage   // bytes read of a WebSocket before a whole message has come: empty frames could be endless (Read)
	messageTimeout = 10 * time.Second // from a WebSocket message's first frame to its last (next)
	messageRate    = 5                // a client's messages a second, in the long run … (begin)
	messageBurst   = 8 + maxRooms     // … and at once. A page comes back with the probe and UPGRADE, CONNECT, join-admin and maxRooms joins
	maxUserType    = 100              // characters of a userType in the log (join)

	// Whispers.
	maxWhispered      = 100      // members of a channel on one node: one whisper is so many deliveries (whisper, fanOut)
	maxWhispers       = 256      // whispers that wait to be sent: past it they are lost (whisper)
	maxWhisperBacklog = 64 << 10 // bytes that wait for a client who gets a whisper: the rest of its queue is for broadcasts (mayWait)
	whisperRate       = 10_000   // deliveries of whispers a second, on one node: some 5 % of a core … (fanOut)
	whisperBurst      = 500      // … and at once

	// What may wait for a client.
	maxBacklog   = 2*maxBody + 1<<10      // bytes for one client, looked at before a frame is added: so three of the largest may wait (mayWait)
	minBacklog   = 4 << 10                // bytes that each may have, however much waits for all; half as many of answers and whispers (mayWait)
	maxWaiting   = 64 << 20               // bytes for all clients, a shared frame counted once; answers and whispers may fill half of it (mayWait)
	stallTimeout = 10 * time.Second       // for a WebSocket to take something of what waits (writer.write)
	closeTimeout = time.Second            // for a client to take what is on its way to it, and to answer a close (end, shutdown)
	upgradeDelay = 100 * time.Millisecond // that a poll takes at least while an upgrade is due: a client whose upgrade never comes polls in a loop (isProbed)
	sendBuffer   = 64 << 10               // bytes in the kernel, which doubles it; else a client that reads nothing takes 4 MB (listen)
	readBuffer   = 64 << 10               // as many for what nobody reads. A segment of loopback's may be as large, and would be dropped with less (listen)

	// Requests.
	maxBody        = 1 << 20            // bytes of a /broadcast request: nginx's default client_max_body_size
	maxChannels    = 100                // of one /broadcast: Pusher's limit, which Laravel code knows
	maxCopies      = 8 * maxBody        // bytes of data times channels: each channel needs a copy with its name
	maxEvent       = 200                // characters of an event's name: Pusher's limit
	maxSocketID    = 64                 // characters of a Socket.IO id: the library's have 24
	requestTimeout = 10 * time.Second   // for a request's header, and again for its body (newServer, routes)
	answerTimeout  = 3 * requestTimeout // for a request's answer to be read, from its header on; of a poll's, from when there is one
	idleTimeout    = 90 * time.Second   // of a kept-alive HTTP connection: longer than nginx's 60 s, so that nginx closes first

	// The fan-out.
	largeRoom    = 16       // members of a room whose broadcaster writes to them itself: 16 system calls are some 50 µs (fanOut)
	maxBatch     = 64 << 10 // bytes that are copied into one system call (writer.load)
	maxUnwritten = 64 << 10 // bytes of frames that writeLarge may be behind, before a broadcast to a large room waits (fanOut)

	// The clients that have to come back, to fetch what they may have missed or to be let in anew.
	maxAtOnce     = 100             // that end at once (reconnect)
	refreshSpread = 5 * time.Second // over which more of them do, and all of a node that may have missed something (reconnect, refresh)

	// The process.
	notifyInterval = 10 * time.Second // between two reports to systemd, which waits for WatchdogSec=30 (supervise)
	// gcPercent is how much the heap may grow, in percent of what is live, before the collector runs (Go's
	// default: 100). Nearly all of it is idle connections' state, so half the head-room saves a quarter of
	// the memory and costs a broadcast no measurable time.
	gcPercent = 50
)

func main() {
	logging.Disable() // go-redis's: what it would print is in the errors that it returns
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, stderr{}); err != nil {
		fmt.Fprintln(stderr{}, "socketio:", err)
		os.Exit(1)
	}
}

// run serves until ctx is done, and then shuts down.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, log io.Writer) error {
	if slices.Equal(args, []string{"--version"}) {
		_, err := fmt.Fprintln(stdout, "socketio", version)
		return err
	}
	if len(args) > 0 {
		return errors.New("it takes no arguments but --version: the environment configures it, see the README's Configuration")
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
	s := newServer(cfg, newLogger(log, cfg.logLevel))
	s.log.Info("listening", "addr", listener.Addr().String(), "version", version, "secured", len(cfg.secrets) > 0,
		"origins", strings.Join(cfg.origins, ","), "redis", cfg.redis != nil, "max_connections", cfg.maxConnections,
		"ping_interval", cfg.pingInterval, "ping_timeout", cfg.pingTimeout)
	if len(cfg.secrets) == 0 {
		s.log.Warn("open mode: anybody on this machine may join and broadcast; set SOCKETIO_SECRET before going public")
	}
	s.limitConnections()
	if cfg.redis != nil {
		s.cluster = newCluster(s, cfg.redis)
		// Not ctx: a broadcast under way has yet to come back from Redis while the server shuts down.
		connected, disconnect := context.WithCancel(context.Background())
		defer disconnect()
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
	// No TCP keepalive: heartbeats and deadlines find out who is gone, and it costs each connection four system calls.
	config := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, raw syscall.RawConn) error {
		var send, read error
		err := raw.Control(func(fd uintptr) {
			send = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, sendBuffer)
			read = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, readBuffer)
		})
		return errors.Join(err, send, read)
	}}
	return config.Listen(ctx, "tcp", addr)
}

// stderr is where the log goes. What it does not take at once is left out: journald may hang, or nobody read
// a pipe, and nothing here is to wait for that. (O_NONBLOCK would do it, too, but a terminal is shared with
// other programs.)
type stderr struct{}

func (stderr) Write(text []byte) (int, error) {
	const fd, room = 2, 4096 // a pipe or a socket that is ready takes so many bytes (pipe(7), PIPE_BUF)
	for part := range slices.Chunk(text, room) {
		if ready, _ := unix.Poll([]unix.PollFd{{Fd: fd, Events: unix.POLLOUT}}, 0); ready != 1 { // or a signal has come
			break
		}
		_, _ = unix.Write(fd, part)
	}
	return len(text), nil
}

func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	text := slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})
	return slog.New(&throttledHandler{Handler: text, last: make(map[string]time.Time)})
}

// throttledHandler passes on a warning or an error at most once a second for each message, so that no client
// can flood the journal. A message names its cause, and is no client's text: up to its first number, since
// net/http's name ports and delays. Nothing here uses Logger.With, which would go past it.
type throttledHandler struct {
	slog.Handler

	mu   sync.Mutex // guards last
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
	log      *slog.Logger
	http     *http.Server
	upgrader websocket.Upgrader
	library  *socket.Server     // makes clients' ids, see newID
	request  *types.HttpContext // an empty one for all clients, which the library only reads headers and a query from
	hub      *hub
	cluster  *cluster // nil without Redis; its problem may be asked for all the same
	started  time.Time
	whispers chan message // to be sent, see sendWhispers
	stopping atomic.Bool

	sessions    sync.Map     // from an Engine.IO session's id to its *session
	connections atomic.Int64 // their number, and that of handshakes under way
	nobodyUntil atomic.Int64 // until when nobody can be displaced, in Unix nanoseconds, see displace
	backlog     backlog

	tcpConns    atomic.Int64 // open, of clients, of nginx, of Laravel
	maxTCPConns int64

	// Since the start, for /health.
	broadcasts, dropped                                            atomic.Int64
	refusedJoins, refusedOrigins, refusedTokens, refusedHandshakes atomic.Int64
}

func newServer(cfg config, log *slog.Logger) *server {
	s := &server{config: cfg, log: log, hub: newHub(), started: time.Now(), library: socket.NewServer(nil, socket.DefaultServerOptions()),
		whispers: make(chan message, maxWhispers), maxTCPConns: math.MaxInt64}
	s.upgrader = websocket.Upgrader{
		ReadBufferSize:  256, // bytes: a client sends little
		WriteBufferPool: new(sync.Pool),
		CheckOrigin:     func(*http.Request) bool { return true }, // see allowOrigin
		Error:           func(w http.ResponseWriter, _ *http.Request, _ int, _ error) { refuseEngine(w, badRequest) },
	}
	s.request = types.NewHttpContext(noAnswer{}, &http.Request{URL: &url.URL{}})
	_ = s.library.On("connection", onConnection)
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: requestTimeout,
		WriteTimeout:      answerTimeout, // from the request's header on: a poll sets its own
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ConnState:         s.onConnState,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		// Else net/http would answer OPTIONS * itself, and wait for its body without the deadline that routes sets.
		DisableGeneralOptionsHandler: true,
		// No ReadTimeout: it would end a long poll that waits for its first message.
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
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// net/http reads a body that is announced, on every path. Where there is none, it watches the connection,
		// and a deadline would end a poll's context.
		if r.ContentLength != 0 {
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(requestTimeout))
		}
		mux.ServeHTTP(w, r)
	})
}

// limitConnections keeps some files back where the limit for them is low: else the self-check would fail, and
// systemd restart a daemon that works. Go's os package has raised the soft limit to the hard one.
func (s *server) limitConnections() {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return
	}
	reserved := min(reservedFiles, limit.Cur/4)
	s.maxTCPConns = int64(min(limit.Cur-reserved, math.MaxInt64)) // it may be unlimited
	if want := s.maxConnections + reservedFiles; limit.Cur < uint64(want) {
		s.maxConnections = min(s.maxConnections, int(s.maxTCPConns))
		s.log.Warn("file limit too low for MAX_CONNECTIONS: raise LimitNOFILE= in socketio.service, or ulimit -n",
			"limit", limit.Cur, "want", want, "max_connections", s.maxConnections)
	}
}

// onConnState counts the open TCP connections; a wire's Close takes off what a WebSocket has taken over.
// Where there are more than maxTCPConns, it closes those that wait for their next request.
func (s *server) onConnState(_ net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if s.tcpConns.Add(1) > s.maxTCPConns {
			s.http.SetKeepAlivesEnabled(false) // this closes them, and those that have asked nothing for 5 s
			s.http.SetKeepAlivesEnabled(true)
		}
	case http.StateClosed:
		s.tcpConns.Add(-1)
	}
}

// shutdown lets every client go in such a way that socket.io-client reconnects by itself. Nothing that
// /broadcast was answered 200 for is lost on the way: it is in the queues, and each session ends behind its
// queue. (With Redis, what comes back later misses this node's clients, as any node's messages do: they
// reconnect and fetch it.) It takes at most a quarter more than closeTimeout, and publishTimeout before that
// where Redis hangs.
func (s *server) shutdown() {
	s.log.Info("stopping", "connections", s.connections.Load())
	s.stopping.Store(true)
	if s.cluster != nil {
		await(context.Background(), &s.cluster.posts) // each has its answer within publishTimeout
	}
	s.hub.stop()
	for _, v := range s.sessions.Range {
		v.(*session).end(serverStops)
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout+closeTimeout/4)
	defer cancel()
	await(ctx, &s.connections)
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
	}
	s.log.Info("stopped", "connections", s.connections.Load())
}

// await waits until there is none of what is counted, or ctx is done.
func await(ctx context.Context, count *atomic.Int64) {
	for count.Load() > 0 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
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
		err := s.selfCheck(ctx, addr)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			s.log.Error("self-check failed", "error", err)
		default:
			status := fmt.Sprintf("%d connections %s", s.connections.Load(), s.cluster.problem())
			notify("READY=1\nWATCHDOG=1\nSTATUS=" + strings.TrimSpace(status))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			notify("STOPPING=1")
			return
		}
	}
}

// selfCheck asks the listener for /health, and takes the lock that every broadcast takes. An answer of 503 will
// do: a restart brings no Redis back.
func (s *server) selfCheck(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req := &http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: addr, Path: "/health"}, Header: http.Header{}}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req.WithContext(ctx)) // past any HTTP_PROXY
	if err != nil {
		return err
	}
	s.hub.counts() // /health takes that lock only for who asks it by a loopback address
	return resp.Body.Close()
}

// Configuration

type config struct {
	host           string
	port           int
	secrets        []string       // one; two, while it changes; none: open mode
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
		if err != nil || !strings.HasPrefix(v, "redis://") && !strings.HasPrefix(v, "rediss://") {
			// It is not quoted, since it may hold a password.
			errs = append(errs, errors.New("REDIS_URL: want redis://[user:password@]host[:port][/database], or rediss:// for TLS; "+
				"in a password write # as %23, $ as %24, % as %25, & as %26, / as %2F and @ as %40"))
		}
	}
	level := get("LOG_LEVEL", "info")
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil || strings.ContainsAny(level, "+-") { // slog takes warn+1
		bad("LOG_LEVEL", level, "debug, info, warn or error")
	}
	return c, errors.Join(errs...)
}

// notInSecret are characters that systemd, a shell and Laravel's .env read each in its own way.
const notInSecret = "\"'`\\$&;|<>()#~"

// checkSecrets says what is wrong with SOCKETIO_SECRET, without quoting it.
func checkSecrets(secrets []string) error {
	unusable := func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(notInSecret, r) }
	for _, secret := range secrets {
		if len(secret) < minSecret || len(secrets) > 2 || strings.ContainsFunc(secret, unusable) {
			return errors.New("SOCKETIO_SECRET: want a secret of 32 or more printable ASCII characters, without white space and " +
				"none of " + notInSecret + ", not even quotation marks around it; or two secrets as new,old; make one with openssl rand -hex 32")
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
	isWhole := err == nil && origin == u.Scheme+"://"+u.Host // else there is a path, a query, or user:password
	if !isWhole || !strings.Contains(entry, "://") {
		return "", false
	}
	if strings.ContainsFunc(entry, func(r rune) bool { return r > '~' }) {
		return "", false // browsers send xn--. Looked for in the entry: the lower case of the kelvin sign is a plain k
	}
	_, notPort := strconv.ParseUint(u.Port(), 10, 16)
	if u.Port() != "" && (notPort != nil || u.Port()[0] == '0') { // 99999, 0 or 080
		return "", false
	}
	host := u.Hostname()
	addr, notAddr := netip.ParseAddr(host)
	switch {
	case slices.Contains([]string{"ws", "wss", "ftp"}, u.Scheme): // no page has these
		return "", false
	case host == "" || host == ".": // file:// and app://. are origins of apps
		return origin, u.Scheme != "http" && u.Scheme != "https" && u.Port() == ""
	case notAddr != nil:
		return origin, originName.MatchString(host)
	}
	return origin, addr.String() == host // as browsers write it
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

// Channels and rooms
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
)

// channelName is a channel's name, taken apart.
type channelName struct {
	prefix, plain string // Pusher's prefix, and the rest
	chatRoom      string // the channel's own room, if it is one of the chat's
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
		c.chatRoom = adminRoom
	case isSession && !isSessionID(id):
		return c, errSessionID
	case isSession:
		c.chatRoom = sessionRoom(id)
	}
	return c, nil
}

// message is an event for the members of channels. In JSON it is the header of a message between daemons.
type message struct {
	ID        string          `json:"id"`               // of that message, made by publish; of a beat its node's
	Until     int64           `json:"until"`            // by Redis's clock, in milliseconds: nobody delivers what Redis has added later. Of no use in a beat
	Channels  []string        `json:"channels"`         // of a beat none
	Except    socket.SocketId `json:"except,omitempty"` // Laravel's toOthers(), or who whispers; empty: nobody
	Event     string          `json:"event,omitempty"`
	Whisper   bool            `json:"whisper,omitempty"`   // of a client: only for channels of at most maxWhispered members
	Reconnect bool            `json:"reconnect,omitempty"` // no event: the members' connections end
	data      []byte          // JSON, byte for byte as it came: Marshal would compact it and escape < and U+2028
}

// check says what is wrong with a message, whoever sent it. Its errors name the field.
func (m *message) check() error {
	copies := 0
	for _, name := range m.Channels {
		channel, err := parseChannel(name)
		if err != nil {
			return fmt.Errorf("channel %.200q: %w", name, err)
		}
		if channel.chatRoom == "" { // the chat's own do not count: most of their members have joined by session, and share one frame
			copies++
		}
	}
	if m.Reconnect {
		return nil
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

// rooms returns where a message goes, each room once. Members of one of the chat's own channels have joined by
// join-session and join-admin, or by its name, which then is private-… (channelPlace). The rooms of those who
// have joined by name come last: fanOut depends on it.
func (m *message) rooms() []string {
	var rooms []string
	for _, name := range m.Channels {
		channel, _ := parseChannel(name)
		switch {
		case channel.chatRoom != "" && !m.Whisper: // who is in a room of the chat has not asked for whispers
			rooms = append(rooms, channel.chatRoom, channelRoom("private-"+channel.plain))
			if !m.Reconnect { // the admins hear each session, but stay where one is closed
				rooms = append(rooms, adminRoom)
			}
		case channel.prefix != "presence-": // nobody is in a presence channel
			rooms = append(rooms, channelRoom(name))
		}
	}
	slices.Sort(rooms)
	rooms = slices.Compact(rooms)
	slices.Reverse(rooms) // by name they begin with a colon, which sorts before all letters
	return rooms
}

// HTTP: /broadcast and /health

func (s *server) handleBroadcast(w http.ResponseWriter, r *http.Request) {
	if status, reason := s.mayBroadcast(r); status != http.StatusOK {
		refuseBroadcast(w, status, reason)
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
		status = http.StatusServiceUnavailable // nobody has it: a retry is safe
		if errors.Is(err, errNoEcho) {
			status = http.StatusGatewayTimeout // a retry might double it
		}
		refuseBroadcast(w, status, err.Error())
		return
	}
	answer["delivered"] = delivered
	s.broadcasts.Add(1)
	s.log.Debug("broadcast", "channels", m.Channels, "delivered", delivered)
	respond(w, http.StatusOK, answer)
}

// mayBroadcast says with which status to refuse a request, before its body is read, and why.
func (s *server) mayBroadcast(r *http.Request) (status int, reason string) {
	switch encoding := r.Header.Get("Content-Encoding"); {
	case r.Method != http.MethodPost:
		return http.StatusMethodNotAllowed, "post it: POST /broadcast"
	case r.Header.Get("Origin") != "":
		return http.StatusForbidden, "browsers may not broadcast: post to your Laravel application instead"
	case len(s.secrets) == 0 && !isLocal(r):
		s.log.Warn("broadcast refused: not a local request, and SOCKETIO_SECRET is not set", "addr", clientAddr(r))
		return http.StatusForbidden, openModeRefusal
	case len(s.secrets) > 0 && !s.authorized(r.Header.Get("Authorization")):
		s.refusedTokens.Add(1)
		s.log.Warn("broadcast refused: no or wrong bearer token", "addr", clientAddr(r))
		return http.StatusUnauthorized, "send Authorization: Bearer with the SOCKETIO_SECRET that this server has"
	case encoding != "" && encoding != "identity":
		return http.StatusUnsupportedMediaType, "send the body as it is, without Content-Encoding"
	}
	return http.StatusOK, ""
}

const openModeRefusal = "this server is in open mode and serves its own machine only: " +
	"set SOCKETIO_SECRET here and in Laravel (a container, as of Sail or Docker, is another machine)"

func refuseBroadcast(w http.ResponseWriter, status int, reason string) {
	switch status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusMethodNotAllowed:
		w.Header().Set("Allow", http.MethodPost)
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	respond(w, status, map[string]any{"success": false, "error": reason})
}

// authorized compares in constant time. How long a secret is may show: the README says it.
func (s *server) authorized(header string) bool {
	return slices.ContainsFunc(s.secrets, func(secret string) bool {
		return hmac.Equal([]byte(header), []byte("Bearer "+secret))
	})
}

// readBody reads what a request brings, within the deadline that routes has set. Its error comes with the
// status to refuse the request with.
func readBody(w http.ResponseWriter, r *http.Request, most int64) (body []byte, status int, err error) {
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is over %d bytes", most)
	}
	if err != nil {
		return nil, http.StatusBadRequest, errors.New("the body did not arrive whole")
	}
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
	case json.Unmarshal(body, &fields) != nil, fields == nil:
		return m, errors.New("the body has to be a JSON object")
	}
	given := func(name string) bool { return len(fields[name]) > 0 && string(fields[name]) != "null" }

	var channel string
	switch {
	case given("channel") && given("channels"):
		return m, errors.New("give channel or channels, not both")
	case given("channels"):
		if json.Unmarshal(fields["channels"], &m.Channels) != nil || len(m.Channels) == 0 || len(m.Channels) > maxChannels {
			return m, fmt.Errorf("channels has to be a list of 1 to %d channel names", maxChannels)
		}
	case !given("channel") || json.Unmarshal(fields["channel"], &channel) != nil:
		return m, errors.New("channel has to be a string, such as chat-session.5 or private-orders.5")
	default:
		m.Channels = []string{channel}
	}
	switch {
	case given("reconnect") && json.Unmarshal(fields["reconnect"], &m.Reconnect) != nil:
		return m, errors.New("reconnect has to be true or false")
	case m.Reconnect && (given("event") || given("data")):
		return m, errors.New("reconnect takes the place of event and data: leave them out")
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
	if problem := s.cluster.problem(); problem != "" {
		health["status"], code = "degraded", http.StatusServiceUnavailable
		if local {
			health["reason"] = problem
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
	health["max_connections"] = s.maxConnections
	health["version"] = version
	health["uptime"] = int64(time.Since(s.started).Seconds())
	health["memory"] = memory[0].Value.Uint64() - memory[1].Value.Uint64()
	health["broadcasts"] = s.broadcasts.Load()
	health["deliveries"] = s.hub.deliveries.Load()
	health["dropped"] = s.dropped.Load()
	health["refused_joins"] = s.refusedJoins.Load()
	health["refused_origins"] = s.refusedOrigins.Load()
	health["refused_tokens"] = s.refusedTokens.Load()
	health["refused_handshakes"] = s.refusedHandshakes.Load()
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

// isLocal reports whether a request comes from this machine itself, and not through a proxy on it. A proxy
// shows by what it adds, by HTTP/1.0, which nginx speaks by default, or by a Host that is not this machine's.
func isLocal(r *http.Request) bool {
	if !peer(r).IsLoopback() || r.Proto != "HTTP/1.1" {
		return false
	}
	for name := range r.Header { // in net/http's spelling: X-Real-Ip
		if name == "Via" || strings.Contains(name, "Forwarded") || strings.HasSuffix(name, "-Ip") || strings.HasSuffix(name, "-Address") {
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

// requestHost returns Host in lower case, without its port and an IPv6 address' brackets; nothing, if it does
// not parse.
func requestHost(r *http.Request) string {
	u, err := url.Parse("//" + r.Host)
	if err != nil {
		return ""
	}
	return strings.ToLower(u.Hostname())
}

// Frames and packets

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

// Socket.IO's packet types (protocol 5), the first character of an Engine.IO message.
const (
	connectPacket      = '0'
	disconnectPacket   = '1'
	eventPacket        = '2'
	ackPacket          = '3'
	connectErrorPacket = '4'
)

// frame is a message on its way: made once, and shared by all queues that it is in.
type frame struct {
	bytes   []byte // as an unmasked WebSocket frame (RFC 6455, section 5.2)
	text    []byte // its payload, an Engine.IO packet: what a poll gets
	kind    frameKind
	holders atomic.Int32 // queues that it is in
}

// frameKind says whom a frame owes its place in a queue to.
type frameKind int

const (
	anAnswer   frameKind = iota // to a message of the client's own, or the protocol's
	aWhisper                    // to another client
	aBroadcast                  // to Laravel
)

// cost is how many bytes a waiting frame takes, with 128 for what holds it.
func (f *frame) cost() int { return len(f.bytes) + 128 }

// newFrame returns a frame of one of RFC 6455's opcodes, which gorilla/websocket's message types are.
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

// newEvent returns a Socket.IO event in an Engine.IO message. The JSON goes in as it is.
func newEvent(name string, data []byte) *frame {
	return newPacket(messagePacket, "%c[%s,%s]", eventPacket, quote(name), data)
}

// frameFor returns the frame for those who have joined a channel by its name; without one, that for the members of
// the chat's rooms.
func (m *message) frameFor(channel string) *frame {
	name, data := m.Event, m.data
	if channel != "" {
		name, data = "broadcast", fmt.Appendf(nil, `{"channel":%s,"event":%s,"data":%s}`, quote(channel), quote(m.Event), m.data)
	}
	f := newEvent(name, data)
	f.kind = aBroadcast
	if m.Whisper {
		f.kind = aWhisper
	}
	return f
}

// quote returns a text as JSON.
func quote(text string) []byte {
	quoted, _ := json.Marshal(text) // always encodes
	return quoted
}

// The fan-out

var (
	errStopped = errors.New("the server is stopping")
	errGone    = errors.New("the connection has ended")
)

// hub is the one index of who is in which room.
//
// A broadcast puts its frame into the queue of every member, under one lock: so all members get all
// broadcasts in one order. A member whose wire was idle is claimed by that, and written to: in small rooms by
// the broadcaster itself, in large ones by one goroutine for all (writeLarge). What comes for a member who is
// claimed waits in its queue and leaves together: so a busy room takes less than a system call a message, and
// a quiet or small one hardly waits.
type hub struct {
	// mu is taken after a session's receiving, and before a session's mu. It guards all that follows, and of
	// each session joined and sequence. Nothing is written to a client under it.
	mu       sync.Mutex
	members  map[socket.SocketId]*session
	rooms    map[string]map[*session]struct{} // none is empty
	sequence uint64                           // number of the last broadcast
	stopped  bool

	claimed   []*session // of large rooms, to be written to by writeLarge …
	isWriting bool       // … which runs
	unwritten int        // bytes of broadcasts to large rooms since its round began; 0 while it does not run
	written   sync.Cond  // of mu: it has written some

	// Not under mu.
	whisperLimit *rate.Limiter // of deliveries of whispers
	deliveries   atomic.Int64  // since the start, for /health
}

func newHub() *hub {
	h := &hub{members: make(map[socket.SocketId]*session), rooms: make(map[string]map[*session]struct{}),
		whisperLimit: rate.NewLimiter(whisperRate, whisperBurst)}
	h.written.L = &h.mu
	return h
}

// enter makes a client known under its Socket.IO id: from now on it may join rooms, until leaveAll. It
// reports whether the session is still open.
func (h *hub) enter(s *session, id socket.SocketId) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != open {
		return false
	}
	h.members[id], s.socketID = s, id
	return true
}

// leaveAll takes a client out of all rooms: it has left the namespace, or its session ends. It returns the id
// that the client had; none, if it had left before.
func (h *hub) leaveAll(s *session) (id socket.SocketId) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, room := range slices.Clone(s.joined) {
		h.remove(s, room)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id, s.socketID = s.socketID, ""
	delete(h.members, id)
	return id
}

// join puts a client into a room, unless it is in maxRooms of them. The admins' room does not count.
func (h *hub) join(s *session, room string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	counted := len(s.joined)
	if slices.Contains(s.joined, adminRoom) {
		counted--
	}
	switch {
	case h.members[s.getSocketID()] != s: // its session has ended meanwhile
		return errGone
	case slices.Contains(s.joined, room):
		return nil
	case counted >= maxRooms && room != adminRoom:
		return fmt.Errorf("a connection may be in at most %d sessions and channels: leave one first", maxRooms)
	}
	s.joined = append(s.joined, room)
	s.roomlessSince.Store(0)
	if h.rooms[room] == nil {
		h.rooms[room] = make(map[*session]struct{})
	}
	h.rooms[room][s] = struct{}{}
	return nil
}

// leave takes a client out of a room. What went into its queue before still leaves, ahead of the answer.
func (h *hub) leave(s *session, room string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remove(s, room)
}

// remove is leave for who holds mu.
func (h *hub) remove(s *session, room string) {
	i := slices.Index(s.joined, room)
	if i < 0 {
		return
	}
	s.joined = slices.Delete(s.joined, i, i+1)
	if len(s.joined) == 0 {
		s.roomlessSince.Store(time.Now().UnixNano())
	}
	delete(h.rooms[room], s)
	if len(h.rooms[room]) == 0 {
		delete(h.rooms, room)
	}
}

// size returns how many are in a room, and whether a client is one of them.
func (h *hub) size(room string, s *session) (members int, joined bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, joined = h.rooms[room][s]
	return len(h.rooms[room]), joined
}

// counts returns the number of session rooms that somebody is in, and of clients in the admins' room.
func (h *hub) counts() (sessions, admins int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for room := range h.rooms {
		if isSessionRoom(room) {
			sessions++
		}
	}
	return sessions, len(h.rooms[adminRoom])
}

// stop has every later broadcast refused.
func (h *hub) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	h.written.Broadcast()
}

// broadcast hands a message to its members on this node, and returns how many frames are on their way. It
// waits for no client, but perhaps for writeLarge (fanOut).
func (h *hub) broadcast(m message) (delivered int, err error) {
	if m.Reconnect {
		return h.reconnect(m)
	}
	idle, delivered, err := h.fanOut(m)
	newWriter().writeAll(idle)
	return delivered, err
}

// fanOut puts a message into its members' queues. It returns those members of small rooms whose wire was
// idle: they are claimed, and the caller has to write to them.
//
// Who is in several of the chat's rooms gets the event once; who has joined channels by name, once more for each
// of these, with its name.
//
// Where writeLarge is maxUnwritten behind, a broadcast to a large room waits for it: else large messages
// would pile up in the queues of those who do read.
func (h *hub) fanOut(m message) (idle []*session, delivered int, err error) {
	rooms := m.rooms()
	var event *frame // for the chat's rooms: where there is one, the admins' is too (rooms), since m is no Reconnect
	if slices.Contains(rooms, adminRoom) {
		event = m.frameFor("")
	}
	isLarge := func(room string) bool { return len(h.rooms[room]) > largeRoom }
	h.mu.Lock()
	defer h.mu.Unlock()
	for !m.Whisper && h.unwritten >= maxUnwritten && !h.stopped && slices.ContainsFunc(rooms, isLarge) {
		h.written.Wait()
	}
	if h.stopped {
		return nil, 0, errStopped
	}
	h.sequence++
	except := h.members[m.Except]
	large := 0 // bytes for large rooms
	for _, room := range rooms {
		members := h.rooms[room]
		if len(members) == 0 {
			continue
		}
		if m.Whisper && (len(members) > maxWhispered || !h.whisperLimit.AllowN(time.Now(), len(members))) {
			continue // it is left out
		}
		f := event
		channel, byName := strings.CutPrefix(room, channelRoom(""))
		if byName {
			f = m.frameFor(channel)
		}
		if isLarge(room) && !m.Whisper {
			large += f.cost()
		}
		for s := range members {
			isCopy := s.sequence == h.sequence // it has the message by one of the rooms before
			if s == except || isCopy && !byName {
				continue
			}
			s.sequence = h.sequence
			queued, claimed := s.push(f, isCopy)
			if queued {
				delivered++
			}
			switch {
			case claimed && isLarge(room):
				h.claimed = append(h.claimed, s)
			case claimed:
				idle = append(idle, s)
			}
		}
	}
	if len(h.claimed) > 0 && !h.isWriting {
		h.isWriting = true
		go h.writeLarge()
	}
	if h.isWriting { // else all members poll, or are written to already: there is nothing to be behind with
		h.unwritten += large
	}
	h.deliveries.Add(int64(delivered))
	return idle, delivered, nil
}

// writeLarge writes to the claimed members of large rooms, until there are none. It is the one goroutine
// that does.
func (h *hub) writeLarge() {
	w := newWriter()
	var claimed []*session
	for {
		h.mu.Lock()
		h.unwritten = 0
		h.written.Broadcast()
		if len(h.claimed) == 0 {
			h.isWriting = false
			h.mu.Unlock()
			return
		}
		claimed, h.claimed = h.claimed, claimed[:0] // the two arrays take turns
		h.mu.Unlock()
		w.writeAll(claimed)
		clear(claimed) // no session is kept
	}
}

// reconnect ends the connections of a message's members, so that their pages come back by themselves, and
// have to be let in by Laravel anew. It returns how many these are.
func (h *hub) reconnect(m message) (members int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stopped {
		return 0, errStopped
	}
	sessions := make(map[*session]struct{})
	for _, room := range m.rooms() {
		maps.Copy(sessions, h.rooms[room])
	}
	delete(sessions, h.members[m.Except])
	var spread time.Duration
	if len(sessions) > maxAtOnce {
		spread = refreshSpread
	}
	for s := range sessions {
		s.endWithin(spread) // by a timer, and so not under mu
	}
	return len(sessions), nil
}

// Several daemons
//
// All daemons on one Redis read one stream, and a broadcast to any of them is added to it and goes nowhere
// else. Its own daemon, too, delivers it when it has read it. Hence the members on all nodes see the messages
// in one order, the stream's, and what Redis has refused is delivered to nobody. A node that was cut off goes
// on behind the last entry that it has read.
//
// Redis may hang, and add an entry long after Laravel had its answer. So each entry has a deadline by Redis's
// clock, and an entry's id begins with the time at which Redis added it: what was added too late, no node
// delivers.
//
// Each node adds a beat now and then, by the same command as a broadcast. It shows whether Redis takes entries,
// tells Redis's clock, and counts the nodes.
//
// Anybody who can reach Redis can add to the stream. So an entry is signed, and checked as a stranger's. Its
// one field, m, is
//
//	hex(HMAC-SHA256(secret, messagePrefix + all that follows this line)), by each secret, with a comma between
//	{"id", "until", "channels", "except", "event", "whisper", "reconnect"}
//	the data, byte for byte
//
// A beat has no channels, and its id is its node's. In open mode the first line is empty.

const (
	publishDeadline = 2 * time.Second         // for Redis to add a message …
	publishTimeout  = 2500 * time.Millisecond // … and for it to come back: below the 3 s that the README's broadcaster waits
	whisperTimeout  = 200 * time.Millisecond  // for Redis to add a whisper: the next ones wait for it
	beatInterval    = 400 * time.Millisecond  // between two beats of a node
	redisSilence    = 1750 * time.Millisecond // within which Redis answers, and each node's beats come: four of them
	redisRetry      = 250 * time.Millisecond  // between two attempts to reach Redis
	redisIdle       = time.Minute             // of a connection: a firewall on the way may forget it after four minutes

	// What a stream keeps for nodes that are cut off: so many entries, and fewer behind a large one. Whispers
	// are owed to nobody, and have a short stream of their own.
	streamLength  = 10_000
	streamBytes   = 64 << 20
	whisperLength = 256
	streamBatch   = 32 // entries that are read at once: of the largest 32 MiB

	refreshInterval = time.Minute // at least, from one refresh to the next: a Redis may fail again and again

	// messagePrefix is signed with each message. Its space keeps it apart from what a join signs,
	// socketId:channel.
	messagePrefix = "socketio redis 3\n"
	maxPublished  = maxBody + 64<<10 // bytes: the data, and 100 channels of 164
)

type cluster struct {
	server        *server
	options       *redis.Options
	stream        string // of broadcasts and beats
	whisperStream string
	node          string                 // this daemon's name
	link          atomic.Pointer[link]   // to the Redis that is read; nil: broadcasts are refused
	trouble       atomic.Pointer[string] // why link is nil, or was the last time
	nodes         atomic.Int64
	atStart       atomic.Int64 // what Redis's clock showed when this daemon started, in milliseconds
	posts         atomic.Int64 // calls of publish under way
	published     sync.Map     // from the ID of a message on its way to the chan int that takes deliver's result

	// Used by run's goroutine.
	runID       string           // of the Redis that was read: each start of one has its own
	last        string           // id of the last entry that was read
	mark        string           // id of the last one at the last beat: while it is in the stream, nothing is missing (beat)
	lastWhisper string           // id of the last whisper that was read
	batch       int64            // entries to read at once: up to streamBatch
	beaten      time.Time        // when this node's last beat was added, by this machine's clock
	beats       map[string]int64 // when each node's last beat was added
	refreshAt   time.Time        // of the last refresh, or of the one to come
}

// link is all connections to one Redis, as long as that is read. Its name may lead to another one by and by: what
// is added there, nobody here would read.
type link struct {
	*redis.Client
	ctx       context.Context
	end       context.CancelCauseFunc // of ctx
	runID     atomic.Value            // a string: what the first connection has found
	firstBeat int64                   // when that was added; used by run's goroutine
}

var (
	errNoRedis = errors.New("Redis takes no broadcasts")
	errNoEcho  = errors.New("Redis has not answered in time: it is not known whether anybody has this broadcast")
	errMoved   = errors.New("its name leads to another Redis now")
	redisRunID = regexp.MustCompile(`run_id:\w+`)
)

func newCluster(s *server, options *redis.Options) *cluster {
	options.Protocol = 2 // nothing here needs RESP 3
	options.DisableIdentity = true
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	options.MaxRetries = -1 // an XADD that is sent again could be added twice
	options.DialerRetries = 1
	options.DialTimeout = redisSilence
	options.ContextTimeoutEnabled = true // a context limits the answer, too
	options.ReadTimeout, options.WriteTimeout = publishTimeout, publishTimeout
	options.ConnMaxIdleTime = redisIdle
	stream := fmt.Sprintf("socketio:%d", options.DB)
	c := &cluster{server: s, options: options, stream: stream, whisperStream: stream + ":whispers",
		node: rand.Text(), mark: "0", beats: make(map[string]int64), batch: streamBatch}
	c.trouble.Store(new("not reached yet"))
	return c
}

// run reads the streams until ctx is done.
func (c *cluster) run(ctx context.Context) {
	for {
		l := c.newLink(ctx)
		err := c.follow(l)
		if ctx.Err() != nil {
			return
		}
		l.end(nil)
		c.fail(l, err)
		clear(c.beats)
		c.nodes.Store(0)
		time.AfterFunc(publishTimeout, func() { l.Close() }) // posts under way may yet have their answers
		<-time.After(redisRetry)
	}
}

// fail notes that Redis takes no broadcasts, and says why, where that is news.
func (c *cluster) fail(l *link, err error) {
	reason := err.Error()
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		reason = "no answer in " + redisSilence.String()
	} else if errno, ok := errors.AsType[syscall.Errno](err); ok {
		reason = errno.Error() // without this side's port, which is another each time
	}
	isNews := c.link.CompareAndSwap(l, nil)
	if c.link.Load() != nil { // another link is up already
		return
	}
	last := c.trouble.Swap(&reason)
	if isNews || *last != reason {
		c.server.log.Warn("redis takes no broadcasts: "+reason, "addr", c.options.Addr)
	}
}

// problem says why Redis takes no broadcasts; nothing, if it does, or there is none.
func (c *cluster) problem() string {
	if c == nil || c.link.Load() != nil {
		return ""
	}
	return errNoRedis.Error() + ": " + *c.trouble.Load()
}

// newLink makes a link. DNS is asked again for each connection.
func (c *cluster) newLink(ctx context.Context) *link {
	l := new(link)
	l.ctx, l.end = context.WithCancelCause(ctx)
	options := *c.options
	options.OnConnect = func(ctx context.Context, conn *redis.Conn) error {
		info, err := conn.Info(ctx, "server").Result()
		if err != nil {
			return err
		}
		runID := redisRunID.FindString(info)
		isFirst := l.runID.CompareAndSwap(nil, runID)
		if !isFirst && l.runID.Load() != runID {
			l.end(errMoved)
			return errMoved
		}
		return nil
	}
	l.Client = redis.NewClient(&options)
	return l
}

// follow delivers what is added, until Redis is out of reach, or refuses something.
func (c *cluster) follow(l *link) (err error) {
	defer catch(&err)
	conn := l.EphemeralConn() // one for all reads, which no other command gets; OnConnect is for it, too
	defer conn.Close()
	for err == nil && l.ctx.Err() == nil {
		err = c.readOn(l, conn)
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	c.batch = 1 // it may have been too much for a slow network
	return err
}

// catch, deferred, makes an error of a panic. go-redis (v9.23.0) panics over an answer of an absurd length.
func catch(err *error) {
	if problem := recover(); problem != nil {
		*err = fmt.Errorf("go-redis: %v", problem)
	}
}

// beat adds this node's beat, and looks whether it has missed anything.
//
// A Redis that was started anew, or is another one, may have lost what this node has delivered, or have what it
// has not, even with an append-only file. Then this node goes on at the stream's end, which the beat is. It
// does so, too, where the beat comes before what was read: the stream is a new one then, and Redis's clock has
// gone back.
//
// XREAD says nothing of entries that were dropped before they could be read: by the stream's bound, by
// FLUSHDB, or by an eviction. The oldest go first. So nothing is missing as long as the mark is there, which is the
// last entry that had been read at the look before: what was not read then is newer.
func (c *cluster) beat(ctx context.Context, l *link, conn *redis.Conn) error {
	marked, err := conn.XRange(ctx, c.stream, c.mark, c.mark).Result()
	if err != nil {
		return err
	}
	missed := len(marked) == 0
	c.beaten = time.Now()
	end, err := c.add(ctx, conn, c.seal(message{ID: c.node}))
	if err != nil {
		return err
	}
	if l.firstBeat == 0 {
		// An id is a time: it serves in both streams. (Where Redis's clock has gone back, whispers wait for it to catch up.)
		l.firstBeat, c.lastWhisper = addedAt(end), end
	}
	if runID := l.runID.Load().(string); c.last == "" || runID != c.runID || addedAt(end) < addedAt(c.last) {
		c.runID, c.last, missed = runID, end, true
	}
	c.mark = c.last
	if missed {
		c.mark = end // the last one may be missing, too: that is the same loss
		c.refresh()
	}
	return nil
}

// readOn adds a beat if one is due, and delivers the next entries, if some come before the next beat.
func (c *cluster) readOn(l *link, conn *redis.Conn) error {
	ctx, cancel := context.WithTimeout(l.ctx, redisSilence)
	defer cancel()
	// A link is up when a beat has come back by it. Where last is the first beat itself, that takes a second one.
	if c.link.Load() == nil || time.Since(c.beaten) >= beatInterval {
		if err := c.beat(ctx, l, conn); err != nil {
			return err
		}
	}
	streams, err := conn.XRead(ctx, &redis.XReadArgs{Streams: []string{c.stream, c.whisperStream, c.last, c.lastWhisper},
		Count: c.batch, Block: beatInterval}).Result()
	if err != nil && err != redis.Nil { // which says that none came
		return err
	}
	c.batch = min(2*c.batch, streamBatch)
	for _, stream := range streams {
		last := &c.last
		if stream.Stream == c.whisperStream {
			last = &c.lastWhisper
		}
		for _, entry := range stream.Messages {
			payload, _ := entry.Values["m"].(string)
			*last = entry.ID
			c.deliver(addedAt(entry.ID), payload)
		}
	}
	// A beat that has come back by this link shows that Redis takes entries, and gives them.
	if c.beats[c.node] >= l.firstBeat && l.ctx.Err() == nil && c.link.Swap(l) == nil {
		c.server.log.Info("redis reached", "addr", c.options.Addr, "stream", c.stream)
	}
	return nil
}

// addedAt returns when an entry was added, by Redis's clock in milliseconds; 0 for what is no entry's id.
func addedAt(id string) (milliseconds int64) {
	const most = 1 << 50 // in 35,000 years; Redis takes any number, and sums of ours must not overflow
	text, _, isID := strings.Cut(id, "-")
	n, err := strconv.ParseInt(text, 10, 64)
	if !isID || err != nil || n > most {
		return 0
	}
	return n
}

// refresh has all clients reconnect, so that their pages fetch from Laravel what they have missed: at once,
// or, after a recent refresh, refreshInterval later than that. A refresh that is still to come serves for
// this loss, too.
func (c *cluster) refresh() {
	now := time.Now()
	if c.refreshAt.After(now) || c.server.connections.Load() == 0 {
		return
	}
	c.refreshAt = c.refreshAt.Add(refreshInterval)
	if c.refreshAt.Before(now) {
		c.refreshAt = now
	}
	time.AfterFunc(c.refreshAt.Sub(now), func() {
		for _, v := range c.server.sessions.Range {
			v.(*session).endWithin(refreshSpread)
		}
	})
}

// deliver delivers an entry, whoever added it. Where writeLarge is behind, it waits, and so does whatever
// comes next.
func (c *cluster) deliver(added int64, payload string) {
	defer c.server.logPanic("redis message panicked")
	m, err := c.unseal(payload)
	delivered := -1
	switch {
	case err != nil:
		c.server.log.Warn("redis message ignored: not from a daemon with this SOCKETIO_SECRET and version",
			"stream", c.stream, "error", err)
		return
	case len(m.Channels) == 0: // a beat
		c.beats[m.ID] = added
		maps.DeleteFunc(c.beats, func(_ string, last int64) bool { return last < added-redisSilence.Milliseconds() })
		c.nodes.Store(int64(len(c.beats)))
		return
	case added <= m.Until:
		delivered, _ = c.server.hub.broadcast(m)
	}
	if result, ok := c.published.LoadAndDelete(m.ID); ok { // this node's own
		result.(chan int) <- delivered
	}
}

// unseal checks a message's signature, and then whether /broadcast could have sent it. Its errors quote none
// of it.
func (c *cluster) unseal(payload string) (m message, err error) {
	signatures, text, _ := strings.Cut(payload, "\n")
	header, data, _ := strings.Cut(text, "\n")
	m.data = []byte(data)
	switch {
	case len(payload) > maxPublished:
		return m, fmt.Errorf("it is over %d bytes", maxPublished)
	case !c.server.isSigned(messagePrefix+text, strings.SplitN(signatures, ",", 3)...):
		return m, errors.New("its signature is missing or wrong")
	case json.Unmarshal([]byte(header), &m) != nil, !utf8.ValidString(header), m.ID == "", len(m.Channels) > maxChannels:
		return m, errors.New("its header is not a message's")
	case len(m.Channels) == 0: // a beat
		return m, nil
	case len(data) > maxBody, !utf8.Valid(m.data), !json.Valid(m.data): // invalid UTF-8 would close every member's WebSocket
		return m, fmt.Errorf("data has to be JSON in UTF-8, of at most %d bytes", maxBody)
	}
	return m, m.check()
}

// entry is a message or a beat on its way into a stream. Once go-redis has asked for its bytes (as it writes
// them, in add's goroutine), Redis may have them.
type entry struct {
	stream string
	length int64 // that the stream is trimmed to
	until  int64 // the message's
	text   string
	sent   bool
}

func (e *entry) MarshalBinary() ([]byte, error) {
	e.sent = true
	return []byte(e.text), nil
}

// now returns what an id in the stream would begin with now, by what add has seen. (This machine's own clock may
// be set.)
func (c *cluster) now() int64 { return c.atStart.Load() + time.Since(c.server.started).Milliseconds() }

// seal returns a message as it is added.
func (c *cluster) seal(m message) *entry {
	m.Until = c.now() + publishDeadline.Milliseconds()
	header, _ := json.Marshal(m) // strings and numbers always encode
	text := string(header) + "\n" + string(m.data)
	text = strings.Join(c.server.sign(messagePrefix+text), ",") + "\n" + text
	if m.Whisper {
		return &entry{stream: c.whisperStream, length: whisperLength, until: m.Until, text: text}
	}
	return &entry{stream: c.stream, length: min(streamLength, streamBytes/int64(len(text))), until: m.Until, text: text}
}

// add adds an entry to its stream, and returns the entry's id.
func (c *cluster) add(ctx context.Context, to redis.Cmdable, e *entry) (id string, err error) {
	defer catch(&err)
	began := time.Since(c.server.started).Milliseconds()
	id, err = to.XAdd(ctx, &redis.XAddArgs{Stream: e.stream, MaxLen: e.length, Approx: true, Values: []any{"m", e}}).Result()
	if err == nil && addedAt(id) == 0 {
		err = fmt.Errorf("%.100q is no entry's id", id)
	}
	if err == nil && e.stream == c.stream { // whose ids may be ahead of Redis's clock, where that has gone back: deadlines are in ids
		c.atStart.Store(addedAt(id) - began) // never too early; too late by what the way to Redis took
	}
	return id, err
}

// publish sends a message to all nodes, and returns how many frames of it are on their way here, and how many
// nodes there are. It takes publishTimeout at most.
//
//	sent  Redis's answer                   read back
//	no                                                  errNoRedis: nobody has it, now or later
//	yes   refused, or added too late                    errNoRedis
//	yes   no answer                        yes, late    errNoRedis
//	yes   added, or no answer              yes          delivered
//	yes   added                            not yet      delivered 0: it is in the stream
//	yes   no answer                        no           errNoEcho: it is not known
func (c *cluster) publish(m message) (delivered int, nodes int64, err error) {
	c.posts.Add(1)
	defer c.posts.Add(-1)
	if c.server.stopping.Load() {
		return 0, 0, errStopped
	}
	l := c.link.Load()
	if l == nil {
		return 0, 0, errNoRedis
	}
	m.ID = rand.Text()
	result := make(chan int, 1)
	c.published.Store(m.ID, result)
	defer c.published.Delete(m.ID)
	ctx, cancel := context.WithTimeout(context.Background(), publishTimeout)
	defer cancel()
	e := c.seal(m)
	id, err := c.add(ctx, l, e)
	if err != nil {
		c.server.log.Warn("publish failed", "error", err)
	}
	if _, refused := errors.AsType[redis.Error](err); refused {
		l.end(err)
		c.fail(l, err) // now: run may wait for some time yet
		return 0, 0, errNoRedis
	}
	if !e.sent || addedAt(id) > e.until {
		return 0, 0, errNoRedis
	}
	select {
	case delivered = <-result:
	case <-ctx.Done():
		if _, stillWaits := c.published.LoadAndDelete(m.ID); !stillWaits {
			delivered = <-result // it was read at the same time
		} else if err != nil {
			return 0, 0, errNoEcho
		} // else it is in the stream, and this node is yet to read it
	}
	if delivered < 0 { // it was added too late
		return 0, 0, errNoRedis
	}
	return delivered, c.nodes.Load(), nil
}

// publishWhisper sends a whisper to all nodes. What Redis does not take is lost.
func (c *cluster) publishWhisper(m message) {
	ctx, cancel := context.WithTimeout(context.Background(), whisperTimeout)
	defer cancel()
	m.ID = c.node // some ID, which no post waits for
	if l := c.link.Load(); l != nil {
		_, _ = c.add(ctx, l, c.seal(m))
	}
}

// Sessions
//
// The library's Engine.IO server (v3.0.6) queues without bound for a client that does not read, takes a
// quick PONG for a missing one, and costs 9 KB more heap a client. So the sessions are our own.

// session is one client's Engine.IO session. All that goes to the client waits in its one queue: polls fetch
// it, or the wire takes it. An upgrade changes who empties the queue, and moves nothing.
type session struct {
	server *server
	id     string // a secret of the client's: who has it can poll
	addr   string

	limiter       *rate.Limiter // of what the client sends
	posting       atomic.Bool   // a POST is under way
	roomlessSince atomic.Int64  // when the client came into no room, in Unix nanoseconds; 0: it is in one

	// receiving is held while a packet is handled: one at a time, whether a POST or the wire brings it. It is
	// taken before hub.mu.
	receiving sync.Mutex

	// Guarded by hub.mu.
	joined   []string // rooms
	sequence uint64   // number of the last broadcast that it got

	// mu is taken last. It guards all that follows. Nothing is written to the client under it.
	mu       sync.Mutex
	changed  sync.Cond // of mu: what a poll waits for may have come
	state    state
	reason   reason          // why it is not open; fixed once it is closed
	socketID socket.SocketId // in the namespace; empty: it has not connected to it, or has left it
	queue    queue
	wire     *wire // the WebSocket that carries the session; nil: its polls do
	probe    *wire // the WebSocket that is tried, while polls carry the session

	// Whoever writes to the client has claimed the front of the queue, and nobody else may. Without a wire that
	// is the poll, while its answer leaves; with a wire it is a writer, or drain, while the wire's socket is full.
	claimed  bool
	draining bool
	polling  *http.ResponseController // of the poll that waits or answers; nil: there is none

	unconnected *time.Timer // calls endUnconnected
	heart       *time.Timer // calls beat at deadline
	deadline    time.Time   // for the client's PONG if one is due, else of the next PING
	ping        *frame      // the PING whose PONG is due; nil: none
	pinged      bool        // it is leaving, or has left, so that a PONG can answer it
}

// state says what a session does with its queue. It only grows. Whether polls or a WebSocket carry the
// session, wire says.
type state int

const (
	open   state = iota // takes frames
	ending              // takes no more messages: what waits leaves, and end's last packet behind it
	closed              // has no queue any more
)

// reason says why a session has left the state open.
type reason int

const (
	clientLeft  reason = iota // it closed the session, or its connection
	failed                    // its connection failed, or a request of its was none
	noPong                    // it has not answered a PING
	unsupported               // it sent what nothing here can do
	forced                    // it sends too much or no CONNECT, has to come back and fetch, or another one needs its place
	serverStops
	unread  // it does not read what waits for it …
	stalled // … or has taken nothing for stallTimeout or answerTimeout
)

// String returns the reason in Socket.IO's words, as far as it has some.
func (r reason) String() string {
	return [...]string{"transport close", "transport error", "ping timeout", "parse error", "forced server close",
		"server shutting down", "it does not read what waits for it", "it has taken nothing for too long"}[r]
}

// begin opens the session, and tells the client so.
func (s *session) begin(upgrades string) {
	s.limiter = rate.NewLimiter(messageRate, messageBurst)
	s.roomlessSince.Store(time.Now().UnixNano())
	s.mu.Lock()
	s.unconnected = time.AfterFunc(connectTimeout, s.endUnconnected)
	s.deadline = time.Now().Add(s.server.pingInterval)
	s.heart = time.AfterFunc(s.server.pingInterval, s.beat)
	s.mu.Unlock()
	s.server.sessions.Store(s.id, s)
	s.send(newPacket(openPacket, `{"maxPayload":%d,"pingInterval":%d,"pingTimeout":%d,"sid":%q,"upgrades":%s}`,
		maxMessage, s.server.pingInterval.Milliseconds(), s.server.pingTimeout.Milliseconds(), s.id, upgrades))
	if s.server.stopping.Load() { // since the request came
		s.end(serverStops)
	}
}

// endUnconnected ends the session of a client that is not in the namespace by now.
func (s *session) endUnconnected() {
	if s.getSocketID() == "" {
		s.end(forced)
	}
}

func (s *session) getState() state {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

func (s *session) getSocketID() socket.SocketId {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.socketID
}

// depart takes the client out of the namespace, for a reason in Socket.IO's words.
func (s *session) depart(why string) {
	if id := s.server.hub.leaveAll(s); id != "" {
		s.server.log.Debug("disconnected", "id", id, "addr", s.addr, "reason", why)
	}
}

// The queue, and its bounds

// queue is what waits for a client, the oldest first. It is its session's, and guarded by the session's mu.
type queue struct {
	frames []*frame
	size   int // bytes of them, by cost …
	caused int // … and of those that clients have caused: answers and whispers
	sent   int // bytes of the first that the wire has taken
}

// backlog is how many bytes wait for all clients, a frame that is in several queues counted once.
type backlog struct {
	total, caused atomic.Int64
}

func (q *queue) enqueue(f *frame, all *backlog) {
	q.frames = append(q.frames, f)
	isFirst := f.holders.Add(1) == 1
	q.count(f, f.cost(), isFirst, all)
}

// count adds bytes of a frame to what waits here, and, where it is the first or was the last queue to hold the
// frame, to what waits for all.
func (q *queue) count(f *frame, bytes int, forAll bool, all *backlog) {
	caused := bytes
	if f.kind == aBroadcast {
		caused = 0
	}
	q.size += bytes
	q.caused += caused
	if forAll {
		all.total.Add(int64(bytes))
		all.caused.Add(int64(caused))
	}
}

// advance notes that bytes of the front have left, and removes the frames that have left whole.
func (q *queue) advance(bytes int, all *backlog) {
	q.sent += bytes
	whole := 0
	for whole < len(q.frames) && q.sent >= len(q.frames[whole].bytes) {
		q.sent -= len(q.frames[whole].bytes)
		whole++
	}
	q.release(whole, all)
}

// release removes the first n frames.
func (q *queue) release(n int, all *backlog) {
	for _, f := range q.frames[:n] {
		wasLast := f.holders.Add(-1) == 0
		q.count(f, -f.cost(), wasLast, all)
	}
	q.frames = slices.Delete(q.frames, 0, n)
	if len(q.frames) == 0 && cap(q.frames) > 16 {
		q.frames = nil // a small array is kept for the next frames
	}
}

// send puts a frame into the queue, and has it leave.
func (s *session) send(f *frame) {
	_, claimed := s.push(f, false)
	s.writeIf(claimed)
}

// push puts a frame into the queue, and never blocks. What may not wait ends the session of a client that is
// too slow for it; but a whisper, which is owed to nobody, is left out.
//
// isCopy: the frame is one more of a broadcast of which the queue has got one. queued: it leaves, unless the
// session ends at once. claimed: the wire was idle, and the caller has to write to it (writer.write).
func (s *session) push(f *frame, isCopy bool) (queued, claimed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.state != open:
		return false, false
	case s.mayWait(f, isCopy):
		s.queue.enqueue(f, &s.server.backlog)
		return true, s.claim()
	case f.kind != aWhisper:
		s.cutOff(unread)
	}
	return false, false
}

// mayWait is the policy for a client that is slow: whether one more frame may wait for it.
//
//   - maxBacklog is the most, looked at before that frame. Copies of one broadcast are measured by the first;
//     check bounds them, but those for the chat's own channels, which are bounded here.
//   - A client that takes what waits may have so much of broadcasts, whatever waits for others.
//   - Else each may have its share of what is left of maxWaiting, and minBacklog always. Anybody can make clients
//     have answers and whispers, without Laravel: so these get half of both. What waits of broadcasts is not held
//     against them: it must not cost a client its session by its next answer.
//   - A client that does not take what waits has an eighth for its share: with 1,000 of them, each has 64 KB.
func (s *session) mayWait(f *frame, isCopy bool) bool {
	q, all := &s.queue, &s.server.backlog
	takes := s.wire != nil && !s.draining || s.wire == nil && s.polling != nil && q.size == 0
	switch {
	case isCopy:
		return q.size <= maxBacklog+maxCopies
	case q.size >= maxBacklog, f.kind == aWhisper && q.size > maxWhisperBacklog:
		return false
	case f.kind == aBroadcast && takes:
		return true
	}
	waits, left, least := q.size, maxWaiting-all.total.Load(), minBacklog
	if f.kind != aBroadcast {
		waits, left, least = q.caused, min(left, maxWaiting/2-all.caused.Load()), minBacklog/2
	}
	if !takes {
		left /= 8
	}
	if f.holders.Load() == 0 { // else it waits for others already, and takes nothing of what is left
		waits += f.cost()
	}
	return waits <= max(int(left), least)
}

// claim reports whether the wire was idle, and is the caller's to write to now. Where there is no wire, a poll
// that waits is woken.
func (s *session) claim() bool {
	s.changed.Broadcast()
	if s.wire == nil || s.claimed || len(s.queue.frames) == 0 {
		return false
	}
	s.claimed = true
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
		newWriter().write(s)
	}
}

// drain goes on with a session's queue where a writer found the socket full.
func (s *session) drain() {
	w := newWriter()
	w.waits = true
	w.write(s)
}

// writer writes queues to their sessions' wires, one after the other. What a socket does not take at once is
// left to a goroutine that waits for it (drain); only that one's writer waits.
type writer struct {
	waits  bool
	buffer []byte                       // several frames that leave in one system call
	try    func(fd uintptr) (done bool) // tryOnce: made once, since a method's value costs an allocation

	// The system call under way.
	out []byte
	n   int // bytes that the socket took
	err error
}

func newWriter() *writer {
	w := new(writer)
	w.try = w.tryOnce
	return w
}

// tryOnce writes what of out the socket takes. While it reports false, the runtime waits until the socket takes something,
// and calls it again (syscall.RawConn).
func (w *writer) tryOnce(fd uintptr) (done bool) {
	n, err := syscall.Write(int(fd), w.out)
	for err == syscall.EINTR {
		n, err = syscall.Write(int(fd), w.out)
	}
	if err == syscall.EAGAIN { // the socket is full
		w.n, w.err = 0, nil
		return !w.waits
	}
	w.n, w.err = max(n, 0), err
	return true
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

// write empties the queue of a session that was claimed into its wire, and gives the claim back. It holds mu
// but for the system call.
func (w *writer) write(s *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.queue.frames) > 0 {
		w.load(s)
		conn := s.wire
		if w.waits {
			_ = conn.TCPConn.SetWriteDeadline(time.Now().Add(stallTimeout))
		}
		s.mu.Unlock()
		err := conn.raw.Write(w.try)
		if err == nil {
			err = w.err
		}
		s.mu.Lock()
		if s.state == closed { // and nobody needs the claim
			return
		}
		s.queue.advance(w.n, &s.server.backlog)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.cutOff(stalled)
			return
		case err != nil:
			s.cutOff(failed)
			return
		case w.n < len(w.out) && !w.waits: // drain has the claim from here on
			s.draining = true
			go s.drain()
			return
		}
	}
	if w.waits {
		_ = s.wire.TCPConn.SetWriteDeadline(time.Time{}) // one that has passed fails even a write that need not wait
	}
	s.claimed, s.draining = false, false
}

// load takes the first frames of a session's queue as what is to be written, without what has left already.
func (w *writer) load(s *session) {
	frames := s.queue.frames
	n, size := 1, len(frames[0].bytes)
	for n < len(frames) && size+len(frames[n].bytes) <= maxBatch {
		size += len(frames[n].bytes)
		n++
	}
	s.pinged = s.pinged || slices.Contains(frames[:n], s.ping)
	w.n, w.err, w.out = 0, nil, frames[0].bytes[s.queue.sent:]
	if n == 1 {
		return
	}
	w.buffer = append(w.buffer[:0], w.out...)
	for _, f := range frames[1:n] {
		w.buffer = append(w.buffer, f.bytes...)
	}
	w.out = w.buffer
}

// The heartbeat

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
		s.queue.enqueue(s.ping, &s.server.backlog)
		s.deadline = s.deadline.Add(s.server.pingTimeout) // from when it was due: so does the client count
		s.heart.Reset(time.Until(s.deadline))
	}
	s.mu.Unlock()
	if silent {
		s.abort(noPong)
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

// The ends
//
// A session ends behind what waits (end), or at once (abort, and cutOff for who holds mu). Behind what waits: a
// poll's closes when its last packet has left (finish), a wire's when the client has answered its close frame, and
// any after closeTimeout.

// end refuses what comes from here on, and ends the session behind what is on its way. Whatever has not left
// after closeTimeout is lost.
func (s *session) end(why reason) {
	s.mu.Lock()
	if s.state != open {
		s.mu.Unlock()
		return
	}
	s.state, s.reason = ending, why
	goodbye := newPacket(closePacket, "")
	switch {
	case s.wire != nil:
		goodbye = goingAway()
	case why == clientLeft: // by polling; its last poll is let go
		goodbye = newPacket(noopPacket, "")
	}
	s.queue.enqueue(goodbye, &s.server.backlog)
	s.mu.Unlock()
	s.wake()
	time.AfterFunc(closeTimeout, func() { s.abort(why) })
	s.depart(why.String())
}

// endWithin has the session end, so that the client comes back and fetches, at some time within a spread. A
// timer's goroutine does it: who calls may hold hub.mu.
func (s *session) endWithin(spread time.Duration) {
	time.AfterFunc(mathrand.N(spread+1), func() { s.end(forced) })
}

// abort ends the session at once, and reports whether it was this call that did. Whatever has not left is
// lost.
func (s *session) abort(why reason) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cutOff(why)
}

// cutOff is abort for who holds mu.
func (s *session) cutOff(why reason) bool {
	if s.state == closed {
		return false
	}
	if s.state == open {
		s.reason = why
	}
	s.state = closed
	s.queue.release(len(s.queue.frames), &s.server.backlog)
	if s.polling != nil { // it may be writing what was released: that ends now. One that waits gets a new deadline to be told (fetch)
		_ = s.polling.SetWriteDeadline(time.Now())
	}
	s.heart.Stop()
	s.unconnected.Stop()
	s.changed.Broadcast()
	go s.giveBack() // whoever cuts off may hold hub.mu
	return true
}

// giveBack gives a closed session's place back, and its connections, and tells the log.
func (s *session) giveBack() {
	s.mu.Lock()
	isUnread := s.reason == unread || s.reason == stalled
	for _, w := range []*wire{s.wire, s.probe} {
		if w == nil || w.TCPConn == nil { // which its handshake is yet to set
			continue
		}
		if isUnread {
			_ = w.SetLinger(0) // the kernel is to drop what it has yet to send
		}
		w.Close()
	}
	s.mu.Unlock()
	s.server.sessions.Delete(s.id)
	s.server.connections.Add(-1)
	s.depart(s.reason.String())
	if isUnread {
		s.server.dropped.Add(1)
		s.server.log.Warn("client cut off", "why", s.reason, "addr", s.addr)
	}
}

// Polling: each GET waits for packets, each POST brings some.

var (
	errOverlap  = errors.New("two polls at once")
	errUpgraded = errors.New("this session has left polling")
)

func (s *session) poll(w http.ResponseWriter, r *http.Request) {
	r.Header, r.URL = nil, nil // net/http and this handler are done with them, and the poll may wait for long with some KB of them
	control := http.NewResponseController(w)
	packets, err := s.fetch(r.Context(), control)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answerPoll(w, packets)
	s.finish(len(packets), control.Flush()) // which also returns what Write met
}

// answerPoll writes packets as one payload.
func answerPoll(w http.ResponseWriter, packets []*frame) {
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.Header().Set("Cache-Control", "no-store")
	for i, f := range packets { // from the shared frames: an answer of our own would be a copy of each
		if i > 0 {
			w.Write([]byte{0x1e})
		}
		w.Write(f.text)
	}
}

// fetch waits for something to send, and returns it. It stays in the queue until finish. A second poll at once
// ends the session, and so does a client that goes away.
func (s *session) fetch(ctx context.Context, control *http.ResponseController) (packets []*frame, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.polling != nil {
		why := failed
		if s.claimed { // it does not read the first one's answer
			why = unread
		}
		s.cutOff(why)
		return nil, errOverlap
	}
	s.polling = control
	_ = control.SetWriteDeadline(time.Time{}) // net/http's would pass while it waits
	came := time.Now()
	timer := time.AfterFunc(upgradeDelay, s.wake) // for isProbed, which is false before
	defer timer.Stop()
	stop := context.AfterFunc(ctx, s.wake)
	defer stop()
	for len(s.queue.frames) == 0 && s.state != closed && s.wire == nil && !s.isProbed(came) && ctx.Err() == nil {
		s.changed.Wait()
	}
	_ = control.SetWriteDeadline(time.Now().Add(answerTimeout))
	switch {
	case s.wire != nil:
		s.polling = nil
		return nil, errUpgraded
	case ctx.Err() != nil:
		s.cutOff(failed)
		return nil, ctx.Err()
	case s.state == closed:
		return []*frame{newPacket(closePacket, "")}, nil
	case len(s.queue.frames) == 0:
		s.queue.enqueue(newPacket(noopPacket, ""), &s.server.backlog)
	}
	s.claimed = true
	s.pinged = s.pinged || slices.Contains(s.queue.frames, s.ping)
	return slices.Clone(s.queue.frames), nil
}

// isProbed reports whether a poll is to be answered with NOOP: the client's probe works, and the client sends
// UPGRADE only when no poll is under way. A poll that has just come has to wait: a client that has not got the
// probe's answer yet, or never will, polls again at once.
func (s *session) isProbed(came time.Time) bool {
	return s.probe != nil && s.probe.answered && time.Since(came) >= upgradeDelay
}

// finish notes that a poll's answer has left, or that it could not. The client knows the answer's end by its last
// chunk, which net/http writes when the handler returns, and may poll again then: not before this.
func (s *session) finish(packets int, err error) {
	s.mu.Lock()
	s.claimed, s.polling = false, nil
	switch {
	case s.state == closed:
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.cutOff(stalled)
	case err != nil:
		s.cutOff(failed)
	default:
		s.queue.release(packets, &s.server.backlog)
		if s.state == ending && len(s.queue.frames) == 0 { // that was end's last packet
			s.cutOff(s.reason)
		}
	}
	s.mu.Unlock()
	s.wake() // an upgrade may have come meanwhile
}

func (s *session) post(w http.ResponseWriter, r *http.Request) {
	if status, err := s.readPost(w, r); err != nil {
		s.abort(failed)
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
	for text := range bytes.SplitSeq(body, []byte{0x1e}) {
		if len(text) > maxMessage {
			return http.StatusRequestEntityTooLarge, fmt.Errorf("a message is over %d bytes", maxMessage)
		}
		if !s.admit(len(text)) {
			break
		}
		if err := s.onPacket(text); err != nil {
			return http.StatusBadRequest, err
		}
	}
	return 0, nil
}

// WebSocket

// wire is a client's WebSocket, which gorilla/websocket reads. What that writes goes through the session's
// queue, except for the answer to the handshake, and what goes to a probe: polls still empty the queue then.
type wire struct {
	*net.TCPConn // nil until net/http has given it up, in the handshake; set under session.mu
	session      *session
	ws           *websocket.Conn
	raw          syscall.RawConn // to write to it
	answered     bool            // under session.mu: it is a probe that works

	// Used by the goroutine that reads it.
	probing bool
	bytes   int // that were read since the last whole message. There may be any number of empty frames, which gorilla/websocket does not show
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

func (w *wire) Write(b []byte) (int, error) {
	if w.ws == nil || w.probing {
		_ = w.TCPConn.SetWriteDeadline(time.Now().Add(requestTimeout)) // nothing else ends a handshake
		return w.TCPConn.Write(b)
	}
	w.session.send(&frame{bytes: bytes.Clone(b)}) // no poll will want its text
	return len(b), nil
}

// SetWriteDeadline does nothing. gorilla/websocket (v1.5.3) sets one to answer a ping and leaves it there:
// the next broadcast would find it passed, and cut a healthy client off.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// Close closes the connection, if there is one yet.
func (w *wire) Close() error {
	if w.TCPConn == nil {
		return nil
	}
	err := w.TCPConn.Close()
	if err == nil { // the first time
		w.session.server.tcpConns.Add(-1)
	}
	return err
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
	_ = w.TCPConn.SetWriteDeadline(time.Time{})
	ws.SetReadLimit(maxMessage)
	answer := ws.PingHandler()
	ws.SetPingHandler(func(data string) error {
		if !w.session.admit(0) { // an empty one has hardly a byte to count, and an answer all the same
			return errTooFast
		}
		return answer(data)
	})
	return nil
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
	if err == nil && free && s.getState() == open {
		_ = w.TCPConn.SetDeadline(time.Now().Add(upgradeTimeout))
		go s.read(w)
		return
	}
	s.detach(w)
}

// read handles what the client sends on a wire, until it ends. It is a goroutine of its own, which waits in
// as few and small frames as can be: so Go takes back the half of its stack that a message has needed, 4 KB
// a client.
func (s *session) read(w *wire) {
	var err error
	defer func() {
		if err == errTooFast { // the client has closeTimeout to read why; then giveBack closes the wire
			return
		}
		s.detach(w)
	}()
	defer s.server.logPanic("reading from a client failed")
	for err == nil {
		var messageType int
		var reader io.Reader
		messageType, reader, err = w.ws.NextReader()
		if err == nil {
			err = s.handle(w, messageType, reader)
		}
	}
}

// handle handles a message of the client's. Its error ends the wire.
func (s *session) handle(w *wire, messageType int, reader io.Reader) error {
	text, err := w.next(messageType, reader)
	switch {
	case err != nil:
		return err
	case w.probing && string(text) == "2probe": // a PING
		if _, err := w.Write(newPacket(pongPacket, "probe").bytes); err != nil {
			return err
		}
		s.mu.Lock()
		w.answered = true
		s.mu.Unlock()
		s.wake()
		return nil
	case w.probing && string(text) == "5": // UPGRADE
		s.attach(w)
		return nil
	case w.probing:
		return errors.New("a probe only probes")
	}
	return s.onPacket(text)
}

// next returns the packet in a message that has begun; of a binary one its type alone, since nobody reads it.
func (w *wire) next(messageType int, reader io.Reader) (text []byte, err error) {
	if !w.probing { // which has upgradeTimeout for all
		_ = w.SetReadDeadline(time.Now().Add(messageTimeout))
		defer w.SetReadDeadline(time.Time{})
	}
	text, err = io.ReadAll(reader)
	if err != nil {
		return nil, err
	}
	if messageType == websocket.TextMessage && !utf8.Valid(text) { // RFC 6455, section 8.1
		invalid := websocket.FormatCloseMessage(websocket.CloseInvalidFramePayloadData, "")
		_ = w.ws.WriteControl(websocket.CloseMessage, invalid, time.Now().Add(closeTimeout))
		return nil, errors.New("a text that is not UTF-8")
	}
	size := max(len(text), w.bytes) // frames cost, too: pings, and a message in pieces
	w.bytes = 0
	if !w.session.admit(size) {
		return nil, errTooFast
	}
	if messageType == websocket.BinaryMessage {
		return []byte{binaryPacket}, nil
	}
	return text, nil
}

// attach has the wire carry everything from here on: the client has sent UPGRADE on it.
func (s *session) attach(w *wire) {
	_ = w.TCPConn.SetDeadline(time.Time{})
	w.probing = false
	s.mu.Lock()
	s.wire, s.probe = w, nil // where the state is closed, giveBack has closed it as the probe, or will as the wire
	if s.state == ending {   // end has queued a packet for a poll, perhaps: a WebSocket ends by a close frame
		s.queue.enqueue(goingAway(), &s.server.backlog)
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
		s.abort(clientLeft)
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

// admit reports whether the client keeps to messageRate with one more packet of so many bytes: each KiB counts
// as one more, for what it takes to read them. If not, its session ends.
func (s *session) admit(size int) bool {
	if s.limiter.AllowN(time.Now(), 1+size/1024) {
		return true
	}
	s.endTooFast()
	return false
}

// endTooFast ends the session of a client that sends too much, and tells it so.
func (s *session) endTooFast() {
	s.tellError(fmt.Sprintf("too many messages: at most %d a second", messageRate))
	s.end(forced)
	s.server.log.Warn("client ended: it sends too many messages", "addr", s.addr)
}

// endUnsupported ends the session of a client that sends what nothing here can do, and tells it so: it would
// come back and do it again.
func (s *session) endUnsupported(what string) {
	s.tellError("not supported: " + what)
	s.end(unsupported)
	s.server.log.Warn("client ended: it sent what is not supported", "addr", s.addr, "what", what)
}

func (s *session) tellError(message string) {
	s.send(newEvent("error", fmt.Appendf(nil, `{"message":%s}`, quote(message))))
}

// onPacket handles a client's packet of Engine.IO's, which admit has let in. Its error says that it was none,
// and has ended the session.
func (s *session) onPacket(text []byte) error {
	s.receiving.Lock()
	defer s.receiving.Unlock()
	if s.getState() != open {
		return nil
	}
	kind := byte(0)
	if len(text) > 0 {
		kind = text[0]
	}
	switch kind {
	case messagePacket:
		s.onMessage(text[1:])
	case pongPacket:
		s.onPong()
	case closePacket: // end, not abort: a poll may be on its way, and behind this on a WebSocket the client's close frame
		s.end(clientLeft)
	case binaryPacket:
		s.endUnsupported("binary data")
	case pingPacket:
		s.endUnsupported("a PING of the client's: since protocol 4 the server sends them")
	case openPacket, upgradePacket, noopPacket: // of no use here
	default:
		s.endUnsupported("no packet of Engine.IO's")
		return errors.New("invalid packet")
	}
	return nil
}

// Socket.IO: the seam to the library
//
// The design asks for this library. It is asked for one thing, the id of each client, and then let go: what it
// would keep for a client costs 4 KB; its rooms lose members, and its queues have no bound (v3.0.6). All that a
// client sends is taken apart here. The library's parser decodes any JSON into anything: of numbers near zero 5 ms
// a KiB.

// newcomer is an Engine.IO connection as the library sees it: it sends CONNECT, and closes. The library asks
// it for what is below, and the events go by an inert engine.Socket of its own.
type newcomer struct {
	engine.Socket
	request *types.HttpContext
	id      chan socket.SocketId
}

func (n *newcomer) ReadyState() string          { return "open" }
func (n *newcomer) Request() *types.HttpContext { return n.request }

// Write and Send drop what the library sends. It is the acknowledgement of the CONNECT, which would leave
// before the client is in the hub.
func (n *newcomer) Write(io.Reader, *packet.Options, engine.SendCallback) engine.Socket { return n }
func (n *newcomer) Send(io.Reader, *packet.Options, engine.SendCallback) engine.Socket  { return n }

// noAnswer is what the library could answer the empty request with.
type noAnswer struct{}

func (noAnswer) Header() http.Header         { return http.Header{} }
func (noAnswer) Write(b []byte) (int, error) { return len(b), nil }
func (noAnswer) WriteHeader(int)             {}

// newID has the library connect a client to its namespace. That runs in a queue of the library's, which always
// comes to onConnection: nothing there refuses a newcomer.
func (s *server) newID() socket.SocketId {
	n := &newcomer{Socket: engine.MakeSocket(), request: s.request, id: make(chan socket.SocketId, 1)}
	socket.NewClient(s.library, n)
	n.Emit("data", types.NewStringBuffer([]byte{connectPacket}))
	id := <-n.id
	n.Emit("close", "transport close")
	return id
}

// onConnection is the library's event: it has an id for a newcomer.
func onConnection(args ...any) {
	client := args[0].(*socket.Socket)
	client.Conn().(*newcomer).id <- client.Id()
}

// onMessage takes a packet of Socket.IO's apart: a type, the namespace and a comma unless it is /, the
// number of an acknowledgement, and JSON.
func (s *session) onMessage(text []byte) {
	if len(text) == 0 {
		s.endUnsupported("an empty message")
		return
	}
	kind, rest, namespace := text[0], text[1:], []byte("/")
	if bytes.HasPrefix(rest, namespace) {
		namespace, rest, _ = bytes.Cut(rest, []byte(","))
	}
	payload := bytes.TrimLeft(rest, "0123456789")
	number := rest[:len(rest)-len(payload)]
	id := s.getSocketID()
	isDefault := string(namespace) == "/"
	switch {
	case len(number) > maxNumber, len(namespace) > maxNamespace:
		s.endUnsupported("a long name of a namespace, or number of an acknowledgement")
	case kind == connectPacket && !isDefault:
		s.send(newPacket(messagePacket, `%c%s,{"message":"Invalid namespace"}`, connectErrorPacket, namespace))
	case kind == connectPacket && id == "":
		s.connect()
	case kind == connectPacket, !isDefault, id == "":
		s.endUnsupported("a packet before CONNECT, a second CONNECT, or another namespace")
	case kind == disconnectPacket:
		s.depart("client namespace disconnect") // the session stays, for another CONNECT
	case kind == eventPacket:
		s.onEvent(id, number, payload)
	case kind == ackPacket && bytes.HasPrefix(payload, []byte("[")): // of nothing: no event here asks for one
	default:
		s.endUnsupported("binary data, or an unknown packet of Socket.IO's")
	}
}

// connect lets the client into the namespace.
func (s *session) connect() {
	id := s.server.newID()
	if !s.server.hub.enter(s, id) {
		return
	}
	s.server.log.Debug("connected", "id", id, "addr", s.addr)
	s.send(newPacket(messagePacket, `%c{"sid":%q}`, connectPacket, id))
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

// unquote returns a JSON string's text; of anything else, nothing.
func unquote(raw json.RawMessage) (text string) {
	_ = json.Unmarshal(raw, &text)
	return text
}

// onEvent handles an event, a list of its name and its arguments, and answers it. Where the client asks for
// an acknowledgement, by a number, it gets the same answer too.
func (s *session) onEvent(id socket.SocketId, number, payload []byte) {
	var event [2]json.RawMessage // encoding/json skips what comes behind them
	name := ""
	if json.Unmarshal(payload, &event) == nil {
		name = unquote(event[0])
	}
	if !bytes.HasPrefix(event[0], []byte(`"`)) || socket.SOCKET_RESERVED_EVENTS.Has(name) {
		s.endUnsupported("an event that is no list with a name in front, or a reserved name")
		return
	}
	answer, data, err := s.handleEvent(id, name, event[1])
	if err != nil {
		s.server.log.Debug("refused", "id", id, "event", fmt.Sprintf("%.100s", name), "error", err)
		s.tellError(err.Error())
		answer, data = "", fmt.Appendf(nil, `{"error":%s}`, quote(err.Error()))
	}
	if answer != "" {
		s.send(newEvent(answer, data))
	}
	if len(number) > 0 {
		s.send(newPacket(messagePacket, "%c%s[%s]", ackPacket, number, data))
	}
}

// handleEvent does what an event asks for, and returns the event that answers it; none for a whisper, which is
// only acknowledged. Its error is a sentence for the front end's author.
func (s *session) handleEvent(id socket.SocketId, name string, raw json.RawMessage) (answer string, data []byte, err error) {
	arg := new(argument)
	isObject := bytes.HasPrefix(raw, []byte("{")) && json.Unmarshal(raw, arg) == nil
	var p place
	switch name {
	case "ping":
		return "pong", fmt.Appendf(nil, `{"timestamp":%q}`, timestamp()), nil
	case "whisper":
		return "", []byte("{}"), s.whisper(id, arg)
	case "join-session", "leave-session":
		if !isObject {
			return "", nil, fmt.Errorf("%s wants an object {sessionId}", name)
		}
		p, err = sessionPlace(arg)
	case "join-admin", "leave-admin":
		p = place{room: adminRoom, signedName: "admin-chat", joined: "joined-admin", left: "left-admin", data: []byte(`{"room":"admin-room"}`)}
		isNothing := len(raw) == 0 || string(raw) == "null"
		if name == "join-admin" && !isObject && !isNothing {
			err = errors.New("join-admin takes nothing, or an object {auth}")
		}
	case "join", "leave":
		p, err = channelPlace(unquote(arg.Channel))
	default:
		err = fmt.Errorf("unknown event %.100q: there are join-session, join-admin, leave-session, leave-admin, join, leave, whisper and ping", name)
	}
	if err != nil {
		return "", nil, err
	}
	if strings.HasPrefix(name, "leave") {
		s.server.hub.leave(s, p.room)
		return p.left, p.data, nil
	}
	return p.joined, p.data, s.join(id, p, arg)
}

// place is what an event wants to join or leave.
type place struct {
	room         string
	signedName   string // what Laravel signs
	joined, left string // the events that answer
	data         []byte // of these, as JSON
}

var isInteger = regexp.MustCompile(`^-?[0-9]+$`)

// sessionPlace returns a chat session's. Its id is a text, or an integer by its characters: 5 and "5" are one
// session.
func sessionPlace(arg *argument) (place, error) {
	id := unquote(arg.SessionID)
	if isInteger.Match(arg.SessionID) {
		id = string(arg.SessionID)
	}
	if !isSessionID(id) {
		return place{}, errSessionID
	}
	data := fmt.Appendf(nil, `{"roomName":%q,"sessionId":%s}`, sessionRoom(id), arg.SessionID) // as it came
	return place{room: sessionRoom(id), signedName: "chat-session." + id, joined: "joined-session", left: "left-session", data: data}, nil
}

// channelPlace returns a channel's, by its name.
func channelPlace(name string) (place, error) {
	p := place{room: channelRoom(name), signedName: name, joined: "joined", left: "left", data: fmt.Appendf(nil, `{"channel":%q}`, name)}
	channel, err := parseChannel(name)
	switch {
	case err != nil:
		return p, err
	case channel.chatRoom != "" && channel.prefix != "private-":
		return p, fmt.Errorf("join %s by the name private-%s, or send join-session or join-admin", name, channel.plain)
	case channel.chatRoom != "":
		p.signedName = channel.plain // as for join-session and join-admin
	case channel.prefix == "presence-":
		return p, errors.New("presence channels are not supported: nobody learns who is present; take a private channel")
	}
	return p, nil
}

// join puts the client into a room, if Laravel has signed that.
func (s *session) join(id socket.SocketId, p place, arg *argument) error {
	if err := s.server.verifyJoin(id, p.signedName, arg.Auth); err != nil {
		s.server.refusedJoins.Add(1)
		s.server.log.Warn("join refused: its signature is wrong or missing, most often since the secrets of Laravel and this daemon differ", "addr", s.addr)
		return err
	}
	if err := s.server.hub.join(s, p.room); err != nil {
		return err
	}
	userType := cmp.Or(unquote(arg.UserType), "guest")
	s.server.log.Debug("joined", "id", id, "room", p.room, "user_type", fmt.Sprintf("%.*s", maxUserType, userType))
	return nil
}

// whisper sends what a member of a private channel says to the other members, past Laravel.
func (s *session) whisper(id socket.SocketId, arg *argument) error {
	channel := unquote(arg.Channel)
	event := unquote(arg.Event)
	m := message{Channels: []string{channel}, Except: id, Event: "client-" + event, Whisper: true, data: arg.Data}
	if m.data == nil {
		m.data = []byte("{}")
	}
	members, joined := s.server.hub.size(channelRoom(channel), s)
	switch {
	case !joined || !strings.HasPrefix(channel, "private-"):
		return fmt.Errorf("whisper is for members of a private channel: join %.164q first", channel)
	case members > maxWhispered:
		return fmt.Errorf("whisper is for channels of at most %d members", maxWhispered)
	case event == "":
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

// sendWhispers sends whispers, one after the other: so they stay in order, and all of them together get as
// much of the processor as one request of Laravel's.
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
	if !s.isSigned(string(id)+":"+channel, unquote(auth)) {
		return fmt.Errorf("auth does not sign socket_id %s for channel %s: ask Laravel anew at each connect, "+
			"and check that both sides have the same SOCKETIO_SECRET", id, channel)
	}
	return nil
}

// sign returns a text's signature by each secret: while it changes, a daemon with new,old understands those
// with either, and is understood by them.
func (s *server) sign(text string) (signatures []string) {
	for _, secret := range s.secrets {
		mac := hmac.New(sha256.New, []byte(secret))
		io.WriteString(mac, text)
		signatures = append(signatures, hex.EncodeToString(mac.Sum(nil)))
	}
	return signatures
}

// isSigned reports, in constant time, whether one of the signatures is a text's by one of the secrets; in open
// mode, whether there is none.
func (s *server) isSigned(text string, signatures ...string) bool {
	if len(s.secrets) == 0 {
		return len(signatures) == 1 && signatures[0] == ""
	}
	return slices.ContainsFunc(s.sign(text), func(want string) bool {
		return slices.ContainsFunc(signatures, func(signature string) bool { return hmac.Equal([]byte(want), []byte(signature)) })
	})
}

// The door: who may open a session

// handleSocketIO serves Engine.IO (protocol 4): handshakes, upgrades, polls and posts.
func (s *server) handleSocketIO(w http.ResponseWriter, r *http.Request) {
	if len(r.URL.RawQuery) > maxQuery {
		refuseEngine(w, badRequest)
		return
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil { // nginx, which counts handshakes by their query, might read it in another way
		refuseEngine(w, badRequest)
		return
	}
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
	known, _ := v.(*session)
	switch {
	case r.Method == http.MethodGet && r.ContentLength != 0: // a poll's answer would wait for the body, past its session's end
		refuseEngine(w, badRequest)
	case !isPoll && !isWebSocket:
		refuseEngine(w, unknownTransport)
	case sid == "" && r.Method != http.MethodGet:
		refuseEngine(w, badMethod)
	case sid == "" && !isPoll && !isUpgrade:
		refuseEngine(w, badRequest)
	case sid == "" && query.Get("EIO") != "4":
		refuseEngine(w, badVersion)
	case sid == "":
		s.handshake(w, r, isPoll)
	case known == nil || known.getState() == closed:
		refuseEngine(w, unknownSession)
	case isUpgrade:
		known.upgrade(w, r)
	case !isPoll || known.upgraded():
		refuseEngine(w, badRequest)
	case r.Method == http.MethodGet:
		known.poll(w, r)
	case r.Method == http.MethodPost:
		known.post(w, r)
	default:
		refuseEngine(w, badRequest)
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
		s.refusedOrigins.Add(1)
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
	// Host has no scheme: whether its port is the default one, the origin's scheme tells. In open mode nothing
	// else would stop a page whose name has been rebound to 127.0.0.1, which makes it the server's own.
	if origin == canonicalOrigin(scheme+"://"+r.Host) && (len(s.secrets) > 0 || hasLoopbackHost(r)) {
		return true
	}
	return slices.ContainsFunc(s.origins, func(allowed string) bool {
		before, domain, isWildcard := strings.Cut(allowed, "*") // https:// and .example.com
		if !isWildcard {
			return allowed == origin
		}
		subdomain, ok := strings.CutSuffix(host, domain)
		return before == scheme+"://" && ok && subdomain != "" && !strings.ContainsAny(subdomain, "/:@")
	})
}

// Engine.IO's errors, as its clients know them.
const (
	unknownTransport = `{"code":0,"message":"Transport unknown"}`
	unknownSession   = `{"code":1,"message":"Session ID unknown"}`
	badMethod        = `{"code":2,"message":"Bad handshake method"}`
	badRequest       = `{"code":3,"message":"Bad request"}`
	badVersion       = `{"code":5,"message":"Unsupported protocol version"}`
)

func refuseEngine(w http.ResponseWriter, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	io.WriteString(w, body)
}

// handshake serves a request that opens an Engine.IO session.
func (s *server) handshake(w http.ResponseWriter, r *http.Request, isPoll bool) {
	isFull := s.connections.Add(1) > int64(s.maxConnections) || s.tcpConns.Load() > s.maxTCPConns
	if isFull && !s.displace() {
		s.connections.Add(-1)
		s.refusedHandshakes.Add(1)
		s.log.Warn("connection refused: MAX_CONNECTIONS are open", "max_connections", s.maxConnections)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	c := &session{server: s, id: rand.Text(), addr: clientAddr(r)}
	c.changed.L = &c.mu
	if isPoll {
		c.begin(`["websocket"]`)
		c.poll(w, r)
		return
	}
	carrier := &wire{session: c}
	if err := carrier.accept(w, r); err != nil {
		s.connections.Add(-1)
		return
	}
	c.wire = carrier
	c.begin(`[]`)
	go c.read(carrier)
}

// displace ends the session that has been in no room for the longest, if that is joinTimeout or more, and
// reports whether it did. (A client that joins at this very moment comes back.)
func (s *server) displace() bool {
	now := time.Now().UnixNano()
	if now < s.nobodyUntil.Load() {
		return false
	}
	for {
		var longest *session
		oldest := now - joinTimeout.Nanoseconds()
		for _, v := range s.sessions.Range {
			c := v.(*session)
			if since := c.roomlessSince.Load(); since > 0 && since <= oldest {
				longest, oldest = c, since
			}
		}
		if longest == nil { // a look over all sessions takes some 0.5 ms: not at each handshake
			s.nobodyUntil.Store(now + joinTimeout.Nanoseconds()/10)
			return false
		}
		longest.roomlessSince.Store(0) // or a later look would find it again
		if longest.abort(forced) {     // else another handshake has, at the same time
			return true
		}
	}
}
