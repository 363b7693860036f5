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
package main

import (
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

	maxMessage     = 16 << 10       // bytes of a client's message: it only joins, leaves and pings; told it as maxPayload
	maxPost        = 4 * maxMessage // bytes of a polling POST: clients before 4.5 post at once what they have, say 100 joins of 300 bytes
	maxBrackets    = 256            // [ and { in a message: a join has two; 16 KiB of them would be a megabyte, decoded
	maxAttachments = 10             // of one binary event: the library's limit
	messageRate    = 20             // a client's messages a second, in the long run; see admit for what counts as one …
	messageBurst   = 8 + maxRooms   // … and at once: a page comes back with an upgrade's two, CONNECT, join-admin and maxRooms joins; 4 to spare

	maxBacklog   = 1 << 20          // bytes that wait for one client: one largest event, or some thousand chat lines
	stallTimeout = 10 * time.Second // a client that takes nothing of its backlog for so long is cut off

	connectTimeout  = 10 * time.Second       // from the handshake to Socket.IO's CONNECT: the client sends it at once
	requestTimeout  = 10 * time.Second       // for a request's header, again for its body, and for its answer
	upgradeTimeout  = 10 * time.Second       // for a client to try its WebSocket and upgrade to it
	idleTimeout     = 90 * time.Second       // of a kept-alive HTTP connection: longer than nginx's 60 s, so that nginx closes first
	closeTimeout    = time.Second            // for a client to take what is on its way to it, and to answer a close
	overtakeTimeout = closeTimeout / 4       // for a poll that its session's CLOSE has overtaken
	upgradeDelay    = 100 * time.Millisecond // for an UPGRADE that a poll has overtaken: what Node lets a poll wait
	pollTimeout     = 3 * requestTimeout     // for the answer to a poll to leave: maxBacklog at 35 KB/s
	maxHeader       = 32 << 10               // bytes: what nginx lets through by default (4 buffers of 8 KiB)

	// A PUBLISH that Redis has not answered may still be executed when it is refused with 503 and posted again. So
	// every node gives up a subscription that is silent for redisSilence before anyone gives up a PUBLISH.
	redisSilence   = 2 * time.Second
	publishTimeout = 2500 * time.Millisecond // below the 3 s that the README's broadcaster waits
	redisRetry     = time.Second             // at most, between two attempts to subscribe
	refreshSpread  = 5 * time.Second         // over which clients reconnect when their node may have missed something

	// gcPercent is how much the heap may grow, in percent of what is live, before the collector runs
	// (Go's default: 100). Nearly all of it is idle connections' state, so half the head-room saves
	// a quarter of the memory and costs a broadcast no measurable time.
	gcPercent = 50
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	logging.Disable()            // go-redis's: what it would print is in the errors it returns
	if err := run(ctx, os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "socketio:", err)
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
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(listener) }()
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
	get := func(name, fallback string) string {
		if v := strings.TrimSpace(getenv(name)); v != "" {
			return v
		}
		return fallback
	}
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
			return len(s) < 16 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
		}) {
			errs = append(errs, errors.New("SOCKETIO_SECRET: want a secret of 16 or more printable ASCII characters without white space, or two of them as new,old; make one with openssl rand -hex 32"))
		}
	}
	for o := range strings.SplitSeq(get("CORS_ORIGINS", defaultOrigins), ",") {
		o = strings.TrimSpace(o)
		origin, want := parseOrigin(o)
		if o == "*" {
			origin, want = o, ""
		}
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
	request *types.HttpContext // what Socket.IO sees of each client's request: nothing
	rooms   *rooms
	cluster *cluster // nil without Redis
	started time.Time

	peers       sync.Map     // from an Engine.IO session's id to its *peer
	connections atomic.Int64 // their number, and that of handshakes under way
	stopping    atomic.Bool
	buffers     sync.Pool // of *[4096]byte, see need

	broadcasts, deliveries, dropped atomic.Int64 // since the start, for /health
}

func newServer(cfg config, log *slog.Logger) *server {
	s := &server{config: cfg, log: log, rooms: newRooms(), started: time.Now()}
	s.buffers.New = func() any { return new([4096]byte) }
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
		if r.Body != http.NoBody {
			// For refused requests too: net/http waits for what their handlers leave of a body. Errors of
			// the deadline show up in the read itself.
			_ = control.SetReadDeadline(time.Now().Add(requestTimeout))
		}
		_ = control.SetWriteDeadline(time.Now().Add(requestTimeout)) // a poll sets its own when it has something
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
	s.peers.Range(func(_, p any) bool {
		p.(*peer).Close(false)
		return true
	})
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

// checkFileLimit warns if the connections that are allowed can't all be opened. Go's os package has raised the
// soft limit to the hard one already.
func (s *server) checkFileLimit() {
	const others = 64 // the listener, HTTP requests, the log
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < uint64(s.maxConnections+others) {
		s.log.Warn("file limit too low for MAX_CONNECTIONS: raise LimitNOFILE= in socketio.service, or ulimit -n",
			"limit", limit.Cur, "want", s.maxConnections+others)
	}
}

// supervise tells systemd (sd_notify(3)) that the daemon serves, how many clients it has and, as long as its
// self-check passes, that it lives: at half of WatchdogSec=, so that one check may be late.
func (s *server) supervise(ctx context.Context, addr string, getenv func(string) string) {
	if getenv("NOTIFY_SOCKET") == "" {
		return
	}
	notify := func(state string) {
		if conn, err := net.Dial("unixgram", getenv("NOTIFY_SOCKET")); err == nil {
			io.WriteString(conn, state)
			conn.Close()
		}
	}
	interval := 15 * time.Second // of the status, where there is no watchdog
	if usec, err := strconv.Atoi(getenv("WATCHDOG_USEC")); err == nil && usec > 0 {
		interval = time.Duration(usec) * time.Microsecond / 2
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := s.selfCheck(ctx, addr); err != nil {
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

// selfCheck asks the listener for /health, and sends a message through the rooms to a member of its own.
func (s *server) selfCheck(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req) // past any HTTP_PROXY
	if err != nil {
		return err
	}
	resp.Body.Close()
	id, probe := socket.SocketId(checkRoom), &peer{server: s}
	s.rooms.enter(id, probe)
	defer s.rooms.DelAll(id)
	s.rooms.join(id, checkRoom)
	event := eventFrame([]byte(`"check"`), []byte(`{}`))
	if _, err := s.rooms.broadcast([]socket.Room{checkRoom}, "", event); err == errStopped {
		return nil
	}
	got, _, err := probe.fetch(ctx)
	if err == nil && !bytes.Equal(got, framePayload(event)) {
		err = fmt.Errorf("sent %q, got %q", framePayload(event), got)
	}
	return err
}

// Socket.IO events

// The rooms. Channels are what Laravel calls them, see roomsOf.
const (
	adminRoom socket.Room = "admin-room"
	checkRoom socket.Room = "self-check" // no channel's: see selfCheck
)

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
	p := client.Conn().(*peer)
	s.rooms.enter(client.Id(), p)
	client.OnAny(func(args ...any) { s.onEvent(client, args) })
	s.log.Debug("connected", "id", client.Id(), "addr", p.addr)
	*client.Handshake() = socket.Handshake{} // nothing reads it, and 16 KiB of JSON are up to 280 KB of it
	if old := p.client.Swap(client); old != nil && old.Connected() {
		p.Close(false) // two CONNECTs at once, where v3.0.5 forgets the first's socket: a client could pile them up
	}
	p.send(encodeFrame(textFrame, fmt.Appendf(nil, `40{"sid":%q}`, client.Id())))
	if p.ReadyState() != "open" {
		// It closed while it connected: v3.0.5 has then run its clean-up before there was anything to clean.
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
	var answer string
	var reply map[string]any
	var err error
	name, _ := args[0].(string)
	switch name {
	case "join-session":
		answer = "joined-session"
		reply, err = s.joinSession(client, args[1:])
	case "join-admin":
		answer = "joined-admin"
		reply, err = s.joinAdmin(client, args[1:])
	case "leave-session":
		answer = "left-session"
		reply, err = s.leaveSession(client, args[1:])
	case "leave-admin":
		answer = "left-admin"
		s.rooms.leave(client.Id(), adminRoom)
		reply = map[string]any{"room": adminRoom}
	case "ping":
		answer = "pong"
		reply = map[string]any{"timestamp": timestamp()}
	default:
		s.log.Debug("unknown event", "id", client.Id(), "event", name)
		return
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

func (s *server) joinSession(client *socket.Socket, args []any) (map[string]any, error) {
	fields, id, err := sessionArgument("join-session", args)
	if err != nil {
		return nil, err
	}
	userType := fields["userType"]
	if userType == nil {
		userType = "guest"
	}
	if userType != "guest" && userType != "admin" {
		return nil, errors.New(`userType has to be "guest" or "admin"`)
	}
	if err := s.verifyJoin(client, "chat-session."+id, fields["auth"]); err != nil {
		return nil, err
	}
	room := sessionRoom(id)
	if !s.rooms.join(client.Id(), room) {
		return nil, fmt.Errorf("a connection may be in at most %d sessions: leave one first", maxRooms)
	}
	s.log.Debug("joined", "id", client.Id(), "room", room, "user_type", userType)
	return map[string]any{"sessionId": fields["sessionId"], "roomName": room}, nil
}

func (s *server) joinAdmin(client *socket.Socket, args []any) (map[string]any, error) {
	var fields map[string]any
	if len(args) > 0 && args[0] != nil {
		var ok bool
		if fields, ok = args[0].(map[string]any); !ok {
			return nil, errors.New("join-admin takes nothing, or an object {auth}")
		}
	}
	if err := s.verifyJoin(client, "admin-chat", fields["auth"]); err != nil {
		return nil, err
	}
	s.rooms.join(client.Id(), adminRoom)
	s.log.Debug("joined", "id", client.Id(), "room", adminRoom)
	return map[string]any{"room": adminRoom}, nil
}

func (s *server) leaveSession(client *socket.Socket, args []any) (map[string]any, error) {
	fields, id, err := sessionArgument("leave-session", args)
	if err != nil {
		return nil, err
	}
	s.rooms.leave(client.Id(), sessionRoom(id))
	return map[string]any{"sessionId": fields["sessionId"], "roomName": sessionRoom(id)}, nil
}

// sessionArgument checks that an event came with an object, and that its sessionId is one.
func sessionArgument(event string, args []any) (fields map[string]any, id string, err error) {
	if len(args) > 0 {
		fields, _ = args[0].(map[string]any)
	}
	if fields == nil {
		return nil, "", fmt.Errorf("%s wants an object {sessionId}", event)
	}
	id, err = parseSessionID(fields["sessionId"])
	return fields, id, err
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
	for _, secret := range s.secrets {
		mac := hmac.New(sha256.New, []byte(secret))
		io.WriteString(mac, string(client.Id())+":"+channel)
		if hmac.Equal([]byte(hex.EncodeToString(mac.Sum(nil))), []byte(signature)) {
			return nil
		}
	}
	return fmt.Errorf("auth does not sign socket_id %s for channel %s: ask Laravel anew at each connect, and check that both sides have the same SOCKETIO_SECRET", client.Id(), channel)
}

// HTTP handlers

// broadcastRequest is the body of POST /broadcast, checked.
type broadcastRequest struct {
	Rooms  []socket.Room   `json:"rooms"`
	Except socket.SocketId `json:"except,omitempty"` // Laravel's toOthers(); empty: nobody
	frame  []byte          // the event as each member gets it
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
		delivered, err = s.deliver(b)
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

// parseBroadcast checks a body and makes the event's frame. Its errors are sentences that name the field.
func parseBroadcast(body []byte) (broadcastRequest, error) {
	var b broadcastRequest
	// RawMessage keeps the data byte for byte; invalid UTF-8 in a text frame would close every member's WebSocket.
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil || fields == nil || !utf8.Valid(body) {
		return b, errors.New("the body has to be one JSON object in UTF-8")
	}
	given := func(name string) bool { return len(fields[name]) > 0 && string(fields[name]) != "null" }

	var channels []string
	switch {
	case given("channel") && given("channels"):
		return b, errors.New("give channel or channels, not both")
	case given("channels"):
		if json.Unmarshal(fields["channels"], &channels) != nil || len(channels) == 0 || len(channels) > maxChannels {
			return b, fmt.Errorf("channels has to be a list of 1 to %d channel names", maxChannels)
		}
	default:
		channels = make([]string, 1)
		if !given("channel") || json.Unmarshal(fields["channel"], &channels[0]) != nil {
			return b, errors.New("channel has to be a string, such as chat-session.5 or admin-chat")
		}
	}
	for _, channel := range channels {
		rooms, err := roomsOf(channel)
		if err != nil {
			return b, err
		}
		for _, room := range rooms {
			if !slices.Contains(b.Rooms, room) {
				b.Rooms = append(b.Rooms, room)
			}
		}
	}

	var event string
	if json.Unmarshal(fields["event"], &event) != nil || event == "" || utf8.RuneCountInString(event) > maxEvent {
		return b, fmt.Errorf("event has to be a string of 1 to %d characters", maxEvent)
	}
	if socket.SOCKET_RESERVED_EVENTS.Has(event) {
		return b, fmt.Errorf("event %q is reserved by Socket.IO: choose another name", event)
	}
	if given("socket") && json.Unmarshal(fields["socket"], &b.Except) != nil {
		return b, errors.New("socket has to be a string: the Socket.IO id that is to be left out")
	}
	data := fields["data"]
	if data == nil {
		data = json.RawMessage("{}")
	}
	name, _ := json.Marshal(event) // a string always encodes
	b.frame = eventFrame(name, data)
	return b, nil
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

// deliver hands an event to the rooms' members on this node, and returns how many connections took it.
func (s *server) deliver(b broadcastRequest) (int, error) {
	delivered, err := s.rooms.broadcast(b.Rooms, b.Except, b.frame)
	s.deliveries.Add(int64(delivered))
	return delivered, err
}

func (s *server) handleHealth(w http.ResponseWriter, r *http.Request) {
	sessions, admins := s.rooms.count()
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
		"deliveries":  s.deliveries.Load(),
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
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	if remote.Addr().Unmap().IsLoopback() {
		forwarded := r.Header.Get("X-Real-IP")
		if forwarded == "" {
			hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
			forwarded = strings.TrimSpace(hops[len(hops)-1])
		}
		if addr, err := netip.ParseAddr(forwarded); err == nil {
			return addr.String()
		}
	}
	return remote.Addr().String()
}

// isLocal reports whether a request comes from this machine itself, and not through a proxy on it, which shows by what
// it adds, by nginx's HTTP/1.0, or by a Host that is not this machine's.
func isLocal(r *http.Request) bool {
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !remote.Addr().Unmap().IsLoopback() || r.Proto != "HTTP/1.1" {
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
	switch transport := query.Get("transport"); {
	case transport != "polling" && transport != "websocket":
		refuseEngine(w, unknownTransport)
	case sid != "":
		s.serveSession(w, r, sid, transport)
	default:
		s.handshake(w, r, transport == "polling")
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

// Engine.IO's refusals.
const (
	unknownTransport    = `{"code":0,"message":"Transport unknown"}`
	unknownSession      = `{"code":1,"message":"Session ID unknown"}`
	badMethod           = `{"code":2,"message":"Bad handshake method"}`
	badRequest          = `{"code":3,"message":"Bad request"}`
	unsupportedProtocol = `{"code":5,"message":"Unsupported protocol version"}`
)

func refuseEngine(w http.ResponseWriter, reason string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	io.WriteString(w, reason)
}

// handshake serves a request that opens an Engine.IO session.
func (s *server) handshake(w http.ResponseWriter, r *http.Request, polling bool) {
	switch {
	case r.Method != http.MethodGet:
		refuseEngine(w, badMethod)
		return
	case !polling && !isWebSocket(r):
		refuseEngine(w, badRequest)
		return
	case r.URL.Query().Get("EIO") != "4":
		refuseEngine(w, unsupportedProtocol)
		return
	}
	if s.connections.Add(1) > int64(s.maxConnections) {
		s.connections.Add(-1)
		s.log.Warn("connection refused: MAX_CONNECTIONS are open", "max_connections", s.maxConnections)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	p := &peer{server: s, id: rand.Text(), addr: clientAddr(r)}
	if polling {
		p.open([]string{"websocket"})
		p.poll(w, r)
		return
	}
	wire, err := hijack(w, p)
	if err != nil {
		s.connections.Add(-1)
		return
	}
	wire.accept(r)
	p.wire = wire
	p.open([]string{}) // not nil, which JSON calls null
	go p.read(wire)
}

// serveSession serves a request that names an Engine.IO session.
func (s *server) serveSession(w http.ResponseWriter, r *http.Request, sid, transport string) {
	v, _ := s.peers.Load(sid)
	p, ok := v.(*peer)
	if !ok || p.gone() {
		refuseEngine(w, unknownSession)
		return
	}
	switch {
	case transport == "websocket" && isWebSocket(r):
		p.upgrade(w, r)
	case transport != "polling" || p.upgraded():
		refuseEngine(w, badRequest)
	case r.Method == http.MethodGet:
		p.poll(w, r)
	case r.Method == http.MethodPost:
		p.post(w, r)
	default:
		refuseEngine(w, badRequest)
	}
}

// Rooms and fan-out

// rooms is the one index of who is in which room, and the library's adapter for it. The one of v3.0.5
// loses a member when a leave meets a join of the same room, encodes a broadcast anew for each member, and
// goes through a dozen locks and allocations for it: twice the CPU time of this, most of which is the system call.
type rooms struct {
	socket.Adapter // for what the library asks of an adapter and nothing here uses

	mu      sync.RWMutex // held while a broadcast is written, so that nobody hears a room after left-session
	members map[socket.SocketId]*member
	rooms   map[socket.Room]map[*member]bool // none is empty
	stopped bool
}

type member struct {
	peer  *peer
	rooms []socket.Room
}

var errStopped = errors.New("the server is stopping")

func newRooms() *rooms {
	return &rooms{Adapter: socket.MakeAdapter(), members: make(map[socket.SocketId]*member), rooms: make(map[socket.Room]map[*member]bool)}
}

// New makes rooms its own constructor: there is one namespace, hence one adapter.
func (r *rooms) New(socket.Namespace) socket.Adapter { return r }

// enter makes a connection known. Only then it may join, and DelAll forgets it.
func (r *rooms) enter(id socket.SocketId, p *peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[id] = &member{peer: p}
}

// join puts a connection into a room, unless it is a session's and the connection is in maxRooms of them.
func (r *rooms) join(id socket.SocketId, room socket.Room) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.members[id]
	if m == nil || slices.Contains(m.rooms, room) { // gone, or in it already
		return true
	}
	sessions := len(m.rooms)
	if slices.Contains(m.rooms, adminRoom) {
		sessions--
	}
	if sessions >= maxRooms && room != adminRoom {
		return false
	}
	m.rooms = append(m.rooms, room)
	if r.rooms[room] == nil {
		r.rooms[room] = make(map[*member]bool)
	}
	r.rooms[room][m] = true
	return true
}

// AddAll is the library's join, of each socket to its private room: nothing here needs it.
func (r *rooms) AddAll(socket.SocketId, *types.Set[socket.Room]) {}

func (r *rooms) leave(id socket.SocketId, room socket.Room) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.members[id]; m != nil {
		m.rooms = slices.DeleteFunc(m.rooms, func(joined socket.Room) bool { return joined == room })
		r.remove(m, room)
	}
}

// DelAll is the library's last word on a connection.
func (r *rooms) DelAll(id socket.SocketId) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.members[id]; m != nil {
		delete(r.members, id)
		for _, room := range m.rooms {
			r.remove(m, room)
		}
	}
}

func (r *rooms) remove(m *member, room socket.Room) {
	delete(r.rooms[room], m)
	if len(r.rooms[room]) == 0 {
		delete(r.rooms, room)
	}
}

// count returns the number of session rooms that somebody is in, and of sockets in the admins' room.
func (r *rooms) count() (sessions, admins int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	sessions = len(r.rooms)
	for _, other := range []socket.Room{adminRoom, checkRoom} {
		sessions -= min(1, len(r.rooms[other]))
	}
	return sessions, len(r.rooms[adminRoom])
}

// stop returns when no broadcast is under way, and has every later one refused.
func (r *rooms) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = true
}

// broadcast hands a frame to the members of the rooms, to each once and not to except, and returns how
// many connections took it. It never waits for a client.
func (r *rooms) broadcast(rooms []socket.Room, except socket.SocketId, frame []byte) (delivered int, err error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.stopped {
		return 0, errStopped
	}
	left := r.members[except]
	for i, room := range rooms {
		for m := range r.rooms[room] {
			had := slices.ContainsFunc(rooms[:i], func(earlier socket.Room) bool { return r.rooms[earlier][m] })
			if m != left && !had && m.peer.send(frame) {
				delivered++
			}
		}
	}
	return delivered, nil
}

// eventFrame returns the event as a frame around an Engine.IO message ("4") around a Socket.IO event ("2").
// The JSON goes in as it is.
func eventFrame(name, data []byte) []byte {
	return encodeFrame(textFrame, slices.Concat([]byte(`42[`), name, []byte(`,`), data, []byte(`]`)))
}

// errorFrame returns the event that answers what is refused before the library has seen it.
func errorFrame(message string) []byte {
	return eventFrame([]byte(`"error"`), fmt.Appendf(nil, `{"message":%q}`, message))
}

// encodeFrame returns an unmasked WebSocket frame (RFC 6455, section 5.2).
func encodeFrame(opcode byte, payload []byte) []byte {
	b := make([]byte, 0, 10+len(payload))
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|opcode, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|opcode, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|opcode, 127), uint64(n))
	}
	return append(b, payload...)
}

// framePayload undoes encodeFrame.
func framePayload(frame []byte) []byte {
	switch frame[1] {
	case 126:
		return frame[4:]
	case 127:
		return frame[10:]
	default:
		return frame[2:]
	}
}

// Several daemons
//
// All daemons on one Redis subscribe to one channel, and a broadcast to any of them is published there and nowhere
// else. Its own daemon, too, delivers it when it comes back: hence the members on all nodes see the messages in one
// order, Redis's, and a message that Redis did not take is delivered to nobody.

type cluster struct {
	server  *server
	client  *redis.Client
	channel string
	up      atomic.Bool
	nodes   atomic.Int64 // subscribers of the channel
	waiting sync.Map     // from the ID of a message on its way to the chan int that takes deliver's result
}

// clusterMessage goes before the frame, in JSON and on a line of its own.
type clusterMessage struct {
	ID string `json:"id"`
	broadcastRequest
}

var errNoRedis = errors.New("Redis is out of reach")

func newCluster(s *server, options *redis.Options) *cluster {
	options.Protocol = 2 // nothing here needs RESP 3
	options.DisableIdentity = true
	options.MaxRetries = -1 // a PUBLISH that is sent again could arrive twice
	options.DialerRetries = 1
	// No ContextTimeoutEnabled: a PUBLISH that had to dial first would be given up less than redisSilence after it was sent.
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = redisSilence, publishTimeout, publishTimeout
	return &cluster{server: s, client: redis.NewClient(options), channel: fmt.Sprintf("socketio:%d", options.DB)}
}

// run keeps the subscription until ctx is done.
func (c *cluster) run(ctx context.Context) {
	defer c.client.Close()
	var retry time.Duration
	for first := true; ; first = false {
		err := c.subscribe(ctx, !first)
		if ctx.Err() != nil {
			return
		}
		c.nodes.Store(0)
		if c.up.Swap(false) || first {
			retry = redisRetry / 16
			c.server.log.Warn("redis out of reach: broadcasts are refused until it is back", "addr", c.client.Options().Addr, "error", err)
		}
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
		retry = min(2*retry, redisRetry)
	}
}

// subscribe delivers what is published, until the subscription is lost. If there was none for a while, messages of other
// nodes may have been missed: so all clients reconnect, and their pages fetch from Laravel what they don't have.
func (c *cluster) subscribe(ctx context.Context, lost bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	subscription := c.client.Subscribe(ctx, c.channel)
	defer subscription.Close()
	if _, err := subscription.ReceiveTimeout(ctx, redisSilence); err != nil { // Redis's answer to SUBSCRIBE
		return err
	}
	c.server.log.Info("redis reached", "addr", c.client.Options().Addr, "channel", c.channel)
	if lost {
		c.server.peers.Range(func(_, p any) bool {
			time.AfterFunc(mathrand.N(refreshSpread), func() { p.(*peer).Close(false) })
			return true
		})
	}
	c.up.Store(true)
	go c.ping(ctx, subscription)
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

// ping has Redis say something on the subscription, and counts the nodes, until ctx is done.
func (c *cluster) ping(ctx context.Context, subscription *redis.PubSub) {
	tick := time.NewTicker(redisSilence / 4)
	defer tick.Stop()
	for ctx.Err() == nil {
		_ = subscription.Ping(ctx) // the silence tells
		if n, err := c.client.PubSubNumSub(ctx, c.channel).Result(); err == nil {
			c.nodes.Store(n[c.channel])
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (c *cluster) deliver(payload string) {
	var m clusterMessage
	header, frame, ok := strings.Cut(payload, "\n")
	if !ok || len(frame) < 2 || json.Unmarshal([]byte(header), &m) != nil {
		c.server.log.Warn("redis message ignored: not from a daemon of this version", "channel", c.channel)
		return
	}
	m.frame = []byte(frame)
	delivered, _ := c.server.deliver(m.broadcastRequest)
	if result, ok := c.waiting.LoadAndDelete(m.ID); ok { // this node's own
		result.(chan int) <- delivered
	}
}

// publish sends an event to all nodes, and returns how many connections of this one took it, and how many nodes got it.
func (c *cluster) publish(b broadcastRequest) (delivered int, nodes int64, err error) {
	if c.server.stopping.Load() {
		return 0, 0, errStopped
	}
	if !c.up.Load() {
		return 0, 0, errNoRedis
	}
	m := clusterMessage{rand.Text(), b}
	header, _ := json.Marshal(m) // strings always encode
	result := make(chan int, 1)
	c.waiting.Store(m.ID, result)
	defer c.waiting.Delete(m.ID)
	ctx, cancel := context.WithTimeout(context.Background(), publishTimeout)
	defer cancel()
	nodes, err = c.client.Publish(ctx, c.channel, slices.Concat(header, []byte("\n"), b.frame)).Result()
	if err != nil {
		c.server.log.Warn("publish failed", "error", err)
		return 0, 0, errNoRedis
	}
	select {
	case delivered = <-result:
	case <-ctx.Done(): // the subscription was lost meanwhile; the other nodes have the message
	}
	return delivered, nodes, nil
}

// Engine.IO sessions
//
// The library's Engine.IO server, at v3.0.5, reads before anyone listens, queues without bound for a client that does
// not read, writes to HTTP responses that have ended, so that bytes meant for one client reach another, closes a client
// whose PONG is quick, and costs 9 KB more heap for each. Its Socket.IO part needs nothing of it but the methods of an
// engine.Socket that begin this section: so the sessions are our own. A peer holds what is on its way to a client,
// whatever carries it: a polling client's is fetched by its polls, a WebSocket client's is written to its wire at once.
// An upgrade hands the queue from the one to the other, so it loses and reorders nothing.

// peer is the far end of one Engine.IO session.
type peer struct {
	engine.Socket // nil: what Socket.IO does not ask for
	server        *server
	id            string // of the session, a secret of the client's: who has it can poll
	addr          string

	onData, onClose types.EventListener           // Socket.IO's
	closing         sync.Once                     // calls onClose
	client          atomic.Pointer[socket.Socket] // the last that connected to the namespace, or nil; it may have left

	receiving   sync.Mutex // held while a packet is handled: one at a time, whether a POST or the wire brings it
	paid        time.Time  // the time by which messageRate allows all that came so far, see admit
	attachments int        // of the last binary event, still to come

	mu       sync.Mutex
	wire     *wire         // nil as long as the client polls
	probe    *wire         // on which the client tries a WebSocket before it upgrades to it
	probed   bool          // it works: the poll that waits is let go, so that the client can upgrade
	queue    [][]byte      // frames for the next poll
	queued   int           // bytes in it
	parked   chan struct{} // there is a poll: it waits, and this wakes it, or its answer is leaving; nil: none
	ending   bool          // takes nothing more; a poll may still fetch the queue
	closed   bool
	heart    *time.Timer // calls beat at deadline
	deadline time.Time   // for the client's PONG if one is due, else of the next PING
	pinged   bool        // a PONG is due
}

func (p *peer) Id() string                                               { return p.id }
func (p *peer) Protocol() int                                            { return 4 }
func (p *peer) Request() *types.HttpContext                              { return p.server.request }
func (p *peer) RemoteAddress() string                                    { return p.addr }
func (p *peer) RemoveListener(types.EventName, types.EventListener) bool { return false }

func (p *peer) ReadyState() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending {
		return "closed"
	}
	return "open"
}

func (p *peer) On(event types.EventName, listeners ...types.EventListener) error {
	switch event {
	case "data":
		p.onData = listeners[0]
	case "close":
		p.onClose = listeners[0]
	}
	return nil
}

func (p *peer) Once(event types.EventName, listeners ...types.EventListener) error {
	return p.On(event, listeners...)
}

// Write sends a packet of Socket.IO's.
func (p *peer) Write(data io.Reader, _ *packet.Options, _ engine.SendCallback) engine.Socket {
	text := slices.Concat([]byte{messagePacket}, data.(types.BufferInterface).Bytes())
	// v3.0.5 acknowledges a CONNECT before it knows the socket, and closes the connection of a client that answers
	// at once with an event. So onConnection does it.
	if !bytes.HasPrefix(text, []byte("40{")) {
		p.send(encodeFrame(textFrame, text))
	}
	return p
}

// Close ends the session from this side: behind what is on its way.
func (p *peer) Close(bool) { p.end(closePacket, closeTimeout) }

// open begins the session: Socket.IO listens, then the client is told.
func (p *peer) open(upgrades []string) {
	s := p.server
	socket.NewClient(s.sio, p)
	p.mu.Lock()
	p.deadline = time.Now().Add(s.pingInterval)
	p.heart = time.AfterFunc(s.pingInterval, p.beat)
	p.mu.Unlock()
	s.peers.Store(p.id, p)
	handshake, _ := json.Marshal(map[string]any{ // strings and numbers always encode
		"sid": p.id, "upgrades": upgrades, "maxPayload": maxMessage,
		"pingInterval": s.pingInterval.Milliseconds(), "pingTimeout": s.pingTimeout.Milliseconds(),
	})
	p.send(encodeFrame(textFrame, append([]byte{openPacket}, handshake...)))
	if s.stopping.Load() { // since the request came
		p.Close(false)
	}
}

// beat sends a PING, or ends the session of a client that has not answered the last one.
func (p *peer) beat() {
	p.mu.Lock()
	silent := p.pinged
	if !p.ending && !silent {
		p.pinged = true
		p.deadline = p.deadline.Add(p.server.pingTimeout)
		p.heart.Reset(time.Until(p.deadline))
	}
	p.mu.Unlock()
	if silent {
		p.terminate()
	} else {
		p.send(encodeFrame(textFrame, []byte{pingPacket}))
	}
}

// gone reports whether the session has closed, or is about to: a client that measures the same time-out may be some
// milliseconds ahead.
func (p *peer) gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed || p.pinged && time.Until(p.deadline) < min(p.server.pingTimeout/20, 10*time.Millisecond)
}

// send takes a frame on its way to the client, and reports whether it could. It never blocks.
func (p *peer) send(frame []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending {
		return false
	}
	if p.wire != nil {
		return p.wire.send(frame)
	}
	if p.queued+len(frame) > maxBacklog {
		p.ending = true
		p.logDropped("it did not fetch its backlog")
		go p.terminate() // not here: it takes the locks that a broadcast holds
		return false
	}
	p.queue = append(p.queue, frame)
	p.queued += len(frame)
	p.wake()
	return true
}

func (p *peer) wake() {
	if p.parked != nil {
		select {
		case p.parked <- struct{}{}:
		default:
		}
	}
}

// admit reports whether the client keeps to messageRate with one more packet, or WebSocket frame of any kind, of so many
// bytes: each KiB counts as one more, as 16 KiB can be half a millisecond of work. If not, it is told so and cut off.
func (p *peer) admit(size int) bool {
	p.receiving.Lock()
	defer p.receiving.Unlock()
	const cost = time.Second / messageRate
	if earliest := time.Now().Add(-messageBurst * cost); p.paid.Before(earliest) { // what it can save up
		p.paid = earliest
	}
	p.paid = p.paid.Add(time.Duration(1+size>>10) * cost)
	if time.Until(p.paid) <= 0 {
		return true
	}
	p.server.log.Debug("cut off: too many messages", "addr", p.addr)
	p.send(errorFrame(fmt.Sprintf("too many messages: at most %d a second", messageRate)))
	p.Close(false)
	return false
}

// onPacket handles a client's packet, which admit has let in.
func (p *peer) onPacket(kind byte, text []byte) {
	p.receiving.Lock()
	defer p.receiving.Unlock()
	switch {
	case p.ReadyState() != "open":
	case kind == pongPacket:
		p.mu.Lock()
		if p.pinged && !p.ending {
			p.pinged = false
			p.deadline = time.Now().Add(p.server.pingInterval)
			p.heart.Reset(p.server.pingInterval)
		}
		p.mu.Unlock()
	case kind == pingPacket: // the server's part since protocol 4
		p.terminate()
	case kind == binaryPacket && p.attachments > 0:
		p.attachments--
	case kind == binaryPacket, kind == messagePacket && p.attachments > 0:
		p.Close(false) // Socket.IO's parser takes the attachments that it was told of, and nothing between them
	case kind == messagePacket:
		p.onMessage(text)
	}
}

// onMessage hands a packet of Socket.IO's to the library, as far as v3.0.5 can take it.
func (p *peer) onMessage(text []byte) {
	if bytes.Count(text, []byte("["))+bytes.Count(text, []byte("{")) > maxBrackets {
		p.send(errorFrame(fmt.Sprintf("a message may have at most %d brackets", maxBrackets)))
		return
	}
	client := p.client.Load()
	switch {
	case string(text) == "1" && client != nil && client.Connected(): // DISCONNECT
		// The namespace is left later than this returns, and a client that connects to it anew at once is
		// closed: so this waits.
		left := make(chan struct{})
		_ = client.Once("disconnect", func(...any) { close(left) })
		p.onData(types.NewStringBuffer(text))
		select {
		case <-left:
		case <-time.After(closeTimeout): // the connection closed at the same time
		}
		return
	case len(text) > 0 && (text[0] == '5' || text[0] == '6'): // an event or an acknowledgement with attachments: 51-["ping",{"_placeholder":true,"num":0}]
		// v3.0.5 keeps it, decoded and up to 17 times as large, until they come. Nothing here takes any: so they are
		// counted, and it is handed over as one without, which is a 2 or a 3.
		count, rest, found := bytes.Cut(text[1:], []byte("-"))
		n, err := strconv.ParseUint(string(count), 10, 0)
		if !found || err != nil || n > maxAttachments {
			p.Close(false)
			return
		}
		p.attachments = int(n)
		text = append([]byte{text[0] - 3}, rest...)
	}
	p.onData(types.NewStringBuffer(text))
}

// end refuses what comes from here on, and ends the session behind what is on its way: a poll is waited for, which
// gets the queue and the last packet; a WebSocket gets a close frame.
func (p *peer) end(last byte, wait time.Duration) {
	p.mu.Lock()
	if p.ending {
		p.mu.Unlock()
		return
	}
	p.ending = true
	if p.wire != nil {
		p.wire.end()
	} else {
		p.queue = append(p.queue, encodeFrame(textFrame, []byte{last}))
		p.wake()
		time.AfterFunc(wait, p.terminate)
	}
	p.mu.Unlock()
	p.closing.Do(func() { p.onClose("server close") })
}

// terminate ends the session at once and gives its place back. Whatever has not left is lost.
func (p *peer) terminate() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.ending, p.closed = true, true
	p.queue, p.queued = nil, 0
	p.heart.Stop()
	p.wake()
	for _, wire := range []*wire{p.wire, p.probe} {
		if wire != nil {
			wire.close()
		}
	}
	p.mu.Unlock()
	p.server.peers.Delete(p.id)
	p.server.connections.Add(-1)
	p.closing.Do(func() { p.onClose("transport close") })
}

// logDropped counts and logs a client that is cut off because it does not read.
func (p *peer) logDropped(why string) {
	p.server.dropped.Add(1)
	p.server.log.Warn("client cut off", "why", why, "addr", p.addr)
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

// Polling: each GET waits for packets, each POST brings some.

func (p *peer) poll(w http.ResponseWriter, r *http.Request) {
	payload, last, err := p.fetch(r.Context())
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(pollTimeout))
	if err != nil {
		if err != errUpgraded { // a second poll at once, or the client went away: both end the session
			p.terminate()
		}
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(payload)
	if last {
		p.terminate()
		return
	}
	p.mu.Lock()
	p.parked = nil // only now: else a client could have any number of answers under way that it does not read
	p.mu.Unlock()
}

var (
	errOverlap  = errors.New("two polls at once")
	errUpgraded = errors.New("this session has left polling")
)

// fetch waits for something to send, and returns it as one Engine.IO payload, which is the session's last if it ends.
func (p *peer) fetch(ctx context.Context) (text []byte, last bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.parked != nil {
		return nil, false, errOverlap
	}
	parked := make(chan struct{}, 1)
	p.parked = parked                 // until the answer has left, so that a second one is refused
	early := time.After(upgradeDelay) // nil when this poll is older, see probeAnswered
	// Until there is a frame, an end, a wire, or a probe that works (once early is over).
	for len(p.queue) == 0 && !p.closed && (!p.probed || early != nil) && p.wire == nil {
		p.mu.Unlock()
		select {
		case <-parked:
		case <-early:
			early = nil
		case <-ctx.Done():
		}
		p.mu.Lock()
		if err := ctx.Err(); err != nil && p.wire == nil {
			return nil, false, err
		}
	}
	if p.wire != nil {
		return nil, false, errUpgraded
	}
	var packets [][]byte
	for _, frame := range p.queue {
		packets = append(packets, framePayload(frame))
	}
	p.queue, p.queued = nil, 0
	switch {
	case p.closed:
		packets = [][]byte{{closePacket}}
	case len(packets) == 0: // probed
		packets = [][]byte{{noopPacket}}
	}
	return bytes.Join(packets, []byte{0x1e}), p.ending, nil
}

func (p *peer) post(w http.ResponseWriter, r *http.Request) {
	body, status, err := readBody(w, r, maxPost)
	if err != nil {
		p.terminate()
		http.Error(w, err.Error(), status)
		return
	}
	for packet := range bytes.SplitSeq(body, []byte{0x1e}) {
		if len(packet) > maxMessage {
			p.terminate()
			http.Error(w, fmt.Sprintf("a message is over %d bytes", maxMessage), http.StatusRequestEntityTooLarge)
			return
		}
		if !p.admit(len(packet)) {
			break
		}
		kind, text, err := decodePacket(packet)
		if err != nil {
			p.terminate()
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if kind == closePacket {
			p.end(noopPacket, overtakeTimeout) // it may have overtaken the client's last poll, which is on another connection
			break
		}
		p.onPacket(kind, text)
	}
	w.Header().Set("Content-Type", "text/html") // as Node has it: some browsers offer text/plain as a download
	io.WriteString(w, "ok")
}

// WebSocket

// upgrade serves the WebSocket handshake of a client that polls. A second WebSocket, or one for a session that has
// upgraded or is ending, is accepted and then closed: Engine.IO's public test suite takes a refused handshake for an error.
func (p *peer) upgrade(w http.ResponseWriter, r *http.Request) {
	wire, err := hijack(w, p)
	if err != nil {
		return
	}
	p.mu.Lock()
	free := p.wire == nil && p.probe == nil && !p.ending
	if free {
		p.probe = wire
	}
	p.mu.Unlock()
	wire.accept(r)
	if !free {
		wire.close()
		return
	}
	_ = wire.conn.SetReadDeadline(time.Now().Add(upgradeTimeout))
	go p.read(wire)
}

// read handles what the client sends on the wire, until it ends. It is a goroutine of its own.
func (p *peer) read(w *wire) {
	defer p.detach(w)
	defer p.server.logPanic("reading from a client failed")
	upgraded := p.upgraded() // from the start; else only by UPGRADE on this wire
	for {
		kind, text, err := w.readPacket()
		if err == errTooFast { // it is not read any more, and has closeTimeout to read why
			<-time.After(closeTimeout)
		}
		if err != nil {
			return
		}
		switch {
		case kind == closePacket && upgraded:
			p.Close(false) // the client's close frame is still to come, and would meet a closed socket
		case kind == closePacket:
			return
		case upgraded:
			p.onPacket(kind, text)
		case kind == pingPacket && string(text) == "probe":
			w.send(encodeFrame(textFrame, []byte("3probe")))
			p.probeAnswered()
		case kind == upgradePacket && p.attach(w):
			upgraded = true
		default:
			return
		}
	}
}

// probeAnswered has the poll that waits answered, since only then the client sends UPGRADE. A poll that has only just
// come may have overtaken that UPGRADE, and goes on waiting for upgradeDelay: to be refused once it is here.
func (p *peer) probeAnswered() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.probed = true
	p.wake()
}

// attach has the wire carry everything from here on: the client has sent UPGRADE on it.
func (p *peer) attach(w *wire) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	_ = w.conn.SetReadDeadline(time.Time{})
	p.wire, p.probe, p.probed = w, nil, false
	for _, frame := range p.queue {
		w.send(frame)
	}
	p.queue, p.queued = nil, 0
	if p.ending { // since the client's last poll
		w.end()
	}
	p.wake()
	return true
}

// detach ends the session if the wire carried it.
func (p *peer) detach(w *wire) {
	w.close()
	p.mu.Lock()
	carried := p.wire == w
	if !carried { // a probe that came to nothing: the next may try
		p.probe, p.probed = nil, false
	}
	p.mu.Unlock()
	if carried {
		p.terminate()
	}
}

// upgraded reports whether the session has left polling, or began without.
func (p *peer) upgraded() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wire != nil
}

// The opcodes of RFC 6455, section 5.2.
const (
	continuationFrame = 0x0
	textFrame         = 0x1
	binaryFrame       = 0x2
	closeFrame        = 0x8
	pingFrame         = 0x9
	pongFrame         = 0xa
)

// wire is a WebSocket's connection with one way to write, which never blocks: what the socket takes at once
// costs one system call and no allocation, the rest goes to a backlog that a goroutine drains. Everything
// takes this way, hence frames never interleave. While it waits for something to read it holds no buffer.
type wire struct {
	conn *net.TCPConn
	raw  syscall.RawConn
	peer *peer

	in []byte // what was read and not handled yet

	mu      sync.Mutex
	backlog [][]byte // while there is one, drain writes and nobody else
	size    int      // bytes in it
	closed  bool     // takes nothing more: a close frame is the last, or the connection has ended

	// The system call under way: set by whoever writes, and fields so that try need not be a new closure each time.
	try  func(fd uintptr) bool
	out  []byte
	wait bool // until the socket takes something
	n    int
	err  error
}

// isWebSocket reports whether a request is a WebSocket handshake (RFC 6455, section 4.2.1).
func isWebSocket(r *http.Request) bool {
	has := func(name, token string) bool {
		return slices.ContainsFunc(strings.Split(strings.Join(r.Header.Values(name), ","), ","), func(s string) bool {
			return strings.EqualFold(strings.TrimSpace(s), token)
		})
	}
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key"))
	return r.Method == http.MethodGet && has("Connection", "Upgrade") && has("Upgrade", "websocket") &&
		r.Header.Get("Sec-WebSocket-Version") == "13" && err == nil && len(key) == 16
}

// hijack takes a WebSocket's connection over from net/http.
func hijack(rw http.ResponseWriter, p *peer) (*wire, error) {
	conn, buffers, err := http.NewResponseController(rw).Hijack()
	if err != nil {
		return nil, err
	}
	w := newWire(conn.(*net.TCPConn), p)                // the listener is ours
	_ = conn.SetDeadline(time.Time{})                   // see routes
	early, _ := buffers.Peek(buffers.Reader.Buffered()) // of a client that did not wait for the answer
	w.in = bytes.Clone(early)
	return w, nil
}

func newWire(conn *net.TCPConn, p *peer) *wire {
	raw, _ := conn.SyscallConn() // fails for nil alone
	w := &wire{conn: conn, raw: raw, peer: p}
	w.try = func(fd uintptr) bool {
		for {
			w.n, w.err = syscall.Write(int(fd), w.out)
			if w.err != syscall.EINTR {
				return !(w.wait && w.err == syscall.EAGAIN)
			}
		}
	}
	return w
}

// accept answers the handshake (RFC 6455, section 4.2.2). Of subprotocols it takes the first, as Node's ws does: a
// browser that offered some and gets none fails the connection.
func (w *wire) accept(r *http.Request) {
	hash := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	answer := fmt.Appendf(nil, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n",
		base64.StdEncoding.EncodeToString(hash[:]))
	if protocol, _, _ := strings.Cut(r.Header.Get("Sec-WebSocket-Protocol"), ","); protocol != "" {
		answer = fmt.Appendf(answer, "Sec-WebSocket-Protocol: %s\r\n", strings.TrimSpace(protocol))
	}
	w.send(append(answer, "\r\n"...))
}

var (
	errFrame   = errors.New("invalid WebSocket frame")
	errTooFast = errors.New("too many frames")
)

// readPacket returns the client's next packet, and answers WebSocket's own pings on the way.
func (w *wire) readPacket() (kind byte, text []byte, err error) {
	var message []byte
	var first byte // the opcode of its first frame
	for {
		final, opcode, payload, err := w.readFrame()
		if err != nil {
			return 0, nil, err
		}
		if !w.peer.admit(len(payload)) {
			return 0, nil, errTooFast
		}
		switch opcode {
		case continuationFrame, textFrame, binaryFrame:
			if (opcode == continuationFrame) != (first != 0) || len(message)+len(payload) > maxMessage {
				return 0, nil, errFrame
			}
			if opcode != continuationFrame {
				first = opcode
			}
			message = append(message, payload...)
			switch {
			case final && first == binaryFrame:
				return binaryPacket, nil, nil
			case final:
				return decodePacket(message)
			}
		case closeFrame:
			w.send(encodeFrame(closeFrame, payload[:min(len(payload), 2)])) // the code, as the client gave it
			return 0, nil, io.EOF
		case pingFrame:
			w.send(encodeFrame(pongFrame, payload))
		case pongFrame:
		default:
			return 0, nil, errFrame
		}
	}
}

// readFrame returns the client's next frame (RFC 6455, section 5.2), without its mask.
func (w *wire) readFrame() (final bool, opcode byte, payload []byte, err error) {
	if err := w.need(2); err != nil {
		return false, 0, nil, err
	}
	final, opcode = w.in[0]&0x80 != 0, w.in[0]&0x0f
	size, start := int(w.in[1]&0x7f), 2
	if w.in[0]&0x70 != 0 || w.in[1]&0x80 == 0 || opcode >= closeFrame && (!final || size > 125) || size == 127 {
		return false, 0, nil, errFrame // a reserved bit, no mask, a control frame that is none, or 64 KiB and more
	}
	if size == 126 {
		if err := w.need(4); err != nil {
			return false, 0, nil, err
		}
		size, start = int(binary.BigEndian.Uint16(w.in[2:])), 4
	}
	if size > maxMessage {
		return false, 0, nil, errFrame
	}
	end := start + 4 + size
	if err := w.need(end); err != nil {
		return false, 0, nil, err
	}
	mask, payload := w.in[start:start+4], w.in[start+4:end]
	for i := range payload {
		payload[i] ^= mask[i%4]
	}
	if w.in = w.in[end:]; len(w.in) == 0 {
		w.in = nil
	}
	return final, opcode, payload, nil
}

// need waits until so many bytes are there, and takes a buffer only when there are some to read.
func (w *wire) need(size int) error {
	for len(w.in) < size {
		var n int
		var failed error
		err := w.raw.Read(func(fd uintptr) bool {
			b := w.peer.server.buffers.Get().(*[4096]byte)
			defer w.peer.server.buffers.Put(b)
			for failed = syscall.EINTR; failed == syscall.EINTR; {
				n, failed = syscall.Read(int(fd), b[:])
			}
			w.in = append(w.in, b[:max(n, 0)]...) // -1 with an error
			return failed != syscall.EAGAIN
		})
		switch {
		case err != nil:
			return err
		case failed != nil:
			return failed
		case n == 0:
			return io.EOF
		}
	}
	return nil
}

// write makes one system call, and returns how many bytes the socket took: 0 if it is full, unless told to wait.
func (w *wire) write(b []byte, wait bool) (int, error) {
	w.out, w.wait, w.n, w.err = b, wait, 0, nil
	err := w.raw.Write(w.try)
	w.out = nil
	if err == nil && w.err != syscall.EAGAIN {
		err = w.err
	}
	return max(w.n, 0), err
}

// send takes a frame, which nobody may change from here on, and reports whether it is on its way.
func (w *wire) send(frame []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.closed = frame[0] == 0x80|closeFrame // nothing follows it
	if len(w.backlog) == 0 {
		n, err := w.write(frame, false)
		if err != nil {
			w.abort() // the reader cleans up
			return false
		}
		if n == len(frame) {
			return true
		}
		frame = frame[n:]
		go w.drain()
	}
	if w.size+len(frame) > maxBacklog {
		w.abort()
		w.peer.logDropped("its backlog is full")
		return false
	}
	w.backlog = append(w.backlog, frame)
	w.size += len(frame)
	return true
}

func (w *wire) drain() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.backlog) > 0 {
		frame := w.backlog[0]
		w.mu.Unlock()
		_ = w.conn.SetWriteDeadline(time.Now().Add(stallTimeout))
		n, err := w.write(frame, true)
		w.mu.Lock()
		if len(w.backlog) == 0 { // aborted or closed meanwhile
			return
		}
		if err != nil {
			w.abort()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				w.peer.logDropped("it took nothing for " + stallTimeout.String())
			}
			return
		}
		w.size -= n
		if n < len(frame) {
			w.backlog[0] = frame[n:]
		} else {
			w.backlog[0], w.backlog = nil, w.backlog[1:] // else the array keeps it
		}
	}
	w.backlog = nil
	_ = w.conn.SetWriteDeadline(time.Time{}) // a deadline that has passed fails even a write that need not wait
}

// abort ends the connection at once; what is under way to the client is lost, and frees its memory in the kernel too.
func (w *wire) abort() {
	w.closed, w.backlog = true, nil
	_ = w.conn.SetLinger(0)
	w.conn.Close()
}

// end sends a close frame (1001, going away) behind everything else, and gives the client closeTimeout to take it.
func (w *wire) end() {
	w.send(encodeFrame(closeFrame, []byte{1001 >> 8, 1001 & 0xff}))
	_ = w.conn.SetReadDeadline(time.Now().Add(closeTimeout))
}

// close ends the connection at once; what the kernel has taken still goes out.
func (w *wire) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed, w.backlog = true, nil
	w.conn.Close()
}
