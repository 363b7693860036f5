// Command socketio is the chat server of a Laravel site that has left Pusher.
//
// Browsers connect to it with the official Socket.IO client and join the room of a chat session, or
// the admins' room. Laravel stores a message in its database, then posts it here, and everyone in the
// room sees it.
//
//	GET  /socket.io/  Socket.IO: protocol 5 over Engine.IO 4, by WebSocket and by HTTP long-polling
//	POST /broadcast   {"channel" or "channels", "event", "data", "socket"}: an event for the rooms' members
//	GET  /health      counters as JSON: 200, or 503 while stopping or without Redis
//
// A client sends join-session, join-admin, leave-session and ping. It is answered with joined-session,
// joined-admin, left-session and pong, or with error.
//
// The environment configures it:
//
//	SOCKET_HOST      address to listen on (127.0.0.1)
//	SOCKET_PORT      port to listen on (3001; 0 picks a free one)
//	SOCKETIO_SECRET  shared with Laravel; unset is open mode: local requests only, without authentication
//	CORS_ORIGINS     origins whose pages may connect (localhost and 127.0.0.1, ports 8000 and 5173; * = any)
//	REDIS_URL        redis:// or rediss://: joins this daemon to all others on the same Redis (unset)
//	MAX_CONNECTIONS  open Socket.IO connections (10000)
//	PING_INTERVAL    Engine.IO heartbeat (25s)
//	PING_TIMEOUT     how long a client has to answer it (20s)
//	LOG_LEVEL        debug, info, warn or error (info)
package main

import (
	"bufio"
	"bytes"
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
	"github.com/zishang520/socket.io/parsers/engine/v3/packet"
	"github.com/zishang520/socket.io/servers/engine/v3"
	"github.com/zishang520/socket.io/servers/engine/v3/transports"
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

	maxMessage   = 16 << 10     // bytes of a client's message: it only joins, leaves and pings; told it as maxPayload
	messageRate  = 20           // a client's messages a second, in the long run …
	messageBurst = 2 + maxRooms // … and at once: a page comes back with CONNECT, join-admin and maxRooms joins

	readRate  = 64 << 10                                           // bytes a second that are read of a WebSocket, in the long run, control frames too …
	readBurst = messageBurst * maxMessage * time.Second / readRate // … and how long the largest burst of messages takes at that rate

	maxBacklog   = 1 << 20          // bytes that wait for one client: one largest event, or some thousand chat lines
	stallTimeout = 10 * time.Second // a client that takes nothing of its backlog for so long is cut off

	maxBinary = 10 // binary messages of one event: the library's limit

	connectTimeout  = 10 * time.Second   // from the handshake to Socket.IO's CONNECT: the client sends it at once
	requestTimeout  = 10 * time.Second   // for a request's header, and again for its body
	idleTimeout     = 90 * time.Second   // of a kept-alive HTTP connection: longer than nginx's 60 s, so that nginx closes first
	closeTimeout    = time.Second        // for a client to take what is on its way to it, and to answer a close
	overtakeTimeout = closeTimeout / 4   // for a poll that its session's CLOSE has overtaken
	pollTimeout     = 3 * requestTimeout // for the answer to a poll to leave: maxBacklog at 35 KB/s
	maxHeader       = 32 << 10           // bytes: what nginx lets through by default (4 buffers of 8 KiB)

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
	redis.SetLogger(silent{})    // what it would print is in the errors it returns
	if err := run(ctx, os.Getenv, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "socketio:", err)
		os.Exit(1)
	}
}

// run serves until ctx is done, and returns nil after a clean shutdown.
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
		return s.shutdown()
	}
}

// silent is go-redis's logger.
type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

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
	origins        []string       // "*" alone: any
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
		o = strings.ToLower(strings.TrimSpace(o))
		u, err := url.Parse(o)
		if o != "*" && (err != nil || u.Host == "" || o != u.Scheme+"://"+u.Host) {
			bad("CORS_ORIGINS", o, "an origin (https://example.com, without a path) nor * for any")
		}
		c.origins = append(c.origins, o)
	}
	if v := get("REDIS_URL", ""); v != "" {
		var err error
		if c.redis, err = redis.ParseURL(v); err != nil || !strings.HasPrefix(v, "redis://") && !strings.HasPrefix(v, "rediss://") {
			errs = append(errs, errors.New("REDIS_URL: want redis://[user:password@]host[:port][/database], or rediss:// for TLS")) // not quoted: it may hold a password
		}
	}
	if err := c.logLevel.UnmarshalText([]byte(get("LOG_LEVEL", "info"))); err != nil {
		bad("LOG_LEVEL", get("LOG_LEVEL", ""), "debug, info, warn or error")
	}
	return c, errors.Join(errs...)
}

// The server

type server struct {
	config
	log     *slog.Logger
	http    *http.Server
	sio     *socket.Server
	engine  engine.Server // sio's Engine.IO server
	rooms   *rooms
	cluster *cluster // nil without Redis
	started time.Time

	stopping    atomic.Bool
	connections atomic.Int64 // Engine.IO sessions of both transports

	broadcasts, deliveries, dropped atomic.Int64 // since the start, for /health
}

func newServer(cfg config, log *slog.Logger) *server {
	s := &server{config: cfg, log: log, rooms: newRooms(), started: time.Now()}
	opts := socket.DefaultServerOptions()
	opts.SetPingInterval(cfg.pingInterval)
	opts.SetPingTimeout(cfg.pingTimeout)
	opts.SetConnectTimeout(connectTimeout)
	opts.SetMaxHttpBufferSize(maxMessage)
	opts.SetTransports(types.NewSet[transports.TransportCtor](&pollingBuilder{}, &webSocketBuilder{}))
	opts.SetAdapter(s.rooms)
	s.sio = socket.NewServer(nil, opts)
	s.engine = s.sio.ServeHandler(nil).(engine.Server)
	_ = s.engine.On("connection", s.onSession)
	_ = s.sio.On("connection", s.onConnection)
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
// through, and each connection ends behind what was written to it. It takes at most a quarter more than closeTimeout.
func (s *server) shutdown() error {
	s.log.Info("stopping", "connections", s.connections.Load())
	s.stopping.Store(true)
	s.rooms.stop()
	s.sio.Close(nil)
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout+closeTimeout/4)
	defer cancel()
	for s.connections.Load() > 0 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
	}
	s.log.Info("stopped", "connections", s.connections.Load())
	return nil
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
	s.rooms.AddAll(id, types.NewSet(checkRoom))
	frame := eventFrame([]byte(`"check"`), []byte(`{}`))
	if _, err := s.rooms.broadcast([]socket.Room{checkRoom}, "", frame); err == errStopped {
		return nil
	}
	got, err := probe.fetch(ctx)
	if err == nil && !bytes.Equal(got, payload(frame)) {
		err = fmt.Errorf("sent %q, got %q", payload(frame), got)
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

// onSession runs when the engine has a new session, before its first packet is read.
func (s *server) onSession(args ...any) {
	session := args[0].(engine.Socket)
	session.Request().Response().(*engineWriter).peer.session = session
	clear(session.Request().Request().Header) // the session keeps its first request for ever
	session.Request().Query().Replace(nil)
}

// onConnection runs when a client has joined the namespace, before its CONNECT is acknowledged: see sendPackets.
func (s *server) onConnection(args ...any) {
	client := args[0].(*socket.Socket)
	p := client.Request().Response().(*engineWriter).peer
	s.rooms.enter(client.Id(), p)
	client.OnAny(func(args ...any) { s.onEvent(client, args) })
	s.log.Debug("connected", "id", client.Id(), "addr", p.addr, "transport", client.Conn().Transport().Name())
	client.Handshake().Auth = nil // nothing reads it, and 16 KiB of JSON are up to a megabyte of it
	p.resume(client)
	if client.Conn().ReadyState() != "open" {
		// It closed while it connected: v3.0.5 has then run its clean-up before there was anything to clean.
		s.rooms.DelAll(client.Id())
		client.Nsp().Remove(client)
	}
}

// onEvent handles one event of a client: its name, its arguments, and the acknowledgement if one is asked for.
func (s *server) onEvent(client *socket.Socket, args []any) {
	defer s.recovered("event handler failed")
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

// recovered, deferred, logs a panic: an event handler's, which the library would print in colours, or a reader's,
// which would end the process.
func (s *server) recovered(message string) {
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
	if !s.rooms.mayJoin(client.Id(), room) {
		return nil, fmt.Errorf("a connection may be in at most %d sessions: leave one first", maxRooms)
	}
	client.Join(room)
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
	client.Join(adminRoom)
	s.log.Debug("joined", "id", client.Id(), "room", adminRoom)
	return map[string]any{"room": adminRoom}, nil
}

func (s *server) leaveSession(client *socket.Socket, args []any) (map[string]any, error) {
	fields, id, err := sessionArgument("leave-session", args)
	if err != nil {
		return nil, err
	}
	client.Leave(sessionRoom(id))
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
	rooms  []socket.Room
	frame  []byte          // the event as each member gets it
	except socket.SocketId // Laravel's toOthers(); empty: nobody
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
	s.log.Debug("broadcast", "rooms", b.rooms, "delivered", delivered)
	respond(w, http.StatusOK, answer)
}

// readBody reads what a request brings. Its error comes with the status to refuse the request with.
func readBody(w http.ResponseWriter, r *http.Request, most int64) (body []byte, status int, err error) {
	body, err = io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the body is over %d bytes", most)
	}
	if err != nil {
		return nil, http.StatusBadRequest, errors.New("the body did not arrive whole")
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // see routes
	return body, 0, nil
}

// deliver hands an event to the rooms' members on this node, and returns how many connections took it.
func (s *server) deliver(b broadcastRequest) (int, error) {
	delivered, err := s.rooms.broadcast(b.rooms, b.except, b.frame)
	s.deliveries.Add(int64(delivered))
	return delivered, err
}

const openModeRefusal = "this server is in open mode and serves its own machine only: set SOCKETIO_SECRET"

// authorized compares hashes, so that the time tells nothing of a secret, nor of its length.
func (s *server) authorized(header string) bool {
	got := sha256.Sum256([]byte(header))
	return slices.ContainsFunc(s.secrets, func(secret string) bool {
		want := sha256.Sum256([]byte("Bearer " + secret))
		return hmac.Equal(got[:], want[:])
	})
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
			if !slices.Contains(b.rooms, room) {
				b.rooms = append(b.rooms, room)
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
	if given("socket") && json.Unmarshal(fields["socket"], &b.except) != nil {
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
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	if peer.Addr().Unmap().IsLoopback() {
		forwarded := r.Header.Get("X-Real-IP")
		if forwarded == "" {
			hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
			forwarded = strings.TrimSpace(hops[len(hops)-1])
		}
		if addr, err := netip.ParseAddr(forwarded); err == nil {
			return addr.String()
		}
	}
	return peer.Addr().String()
}

// isLocal reports whether a request comes from this machine itself, and not through a proxy on it.
func isLocal(r *http.Request) bool {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().Unmap().IsLoopback() &&
		r.Header.Get("Forwarded") == "" && r.Header.Get("X-Forwarded-For") == "" && r.Header.Get("X-Real-IP") == ""
}

// handleSocketIO stands in front of the library's engine. The engine makes the handshakes and the upgrades;
// polls and posts of a session go straight to its polling transport. So no code of the library ever writes to
// a response, which v3.0.5 does after the request has ended: bytes meant for one client then reach another.
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
	if sid != "" {
		s.serveSession(w, r, sid)
		return
	}
	if s.connections.Add(1) > int64(s.maxConnections) {
		s.connections.Add(-1)
		s.log.Warn("connection refused: MAX_CONNECTIONS are open", "max_connections", s.maxConnections)
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many connections", http.StatusServiceUnavailable)
		return
	}
	p := &peer{server: s, addr: clientAddr(r), tokens: messageBurst, refilled: time.Now()}
	switch t := s.serveEngine(w, r, p).(type) {
	case *polling:
		t.poll(w, r)
	case *webSocket:
		go t.read()
	default:
		p.close()
	}
}

// allowOrigin answers a request from a page that may not connect, and lets the others' pages read the answer.
func (s *server) allowOrigin(w http.ResponseWriter, r *http.Request) bool {
	origin := r.Header.Get("Origin")
	w.Header().Add("Vary", "Origin")
	switch {
	case origin == "": // not a browser
	case slices.Contains(s.origins, origin):
		w.Header().Set("Access-Control-Allow-Origin", origin)
		w.Header().Set("Access-Control-Allow-Credentials", "true")
	case slices.Contains(s.origins, "*"):
		w.Header().Set("Access-Control-Allow-Origin", "*")
	default:
		s.log.Warn("origin refused: add it to CORS_ORIGINS if it is yours", "origin", fmt.Sprintf("%.100s", origin), "addr", clientAddr(r))
		http.Error(w, "this origin is not in CORS_ORIGINS", http.StatusForbidden)
		return false
	}
	return true
}

const badRequest, unknownSession = `{"code":3,"message":"Bad request"}`, `{"code":1,"message":"Session ID unknown"}` // as Engine.IO has them

// serveSession serves a request that names an Engine.IO session.
func (s *server) serveSession(w http.ResponseWriter, r *http.Request, sid string) {
	refusal := unknownSession
	if session, ok := s.engine.Clients().Load(sid); ok {
		refusal = badRequest // also for one that is a WebSocket: v3.0.5 would hang a poll, and upgrade it to another
		t, polls := session.Transport().(*polling)
		if polls && t.peer.gone() {
			t.OnError("ping timeout", nil)
			polls, refusal = false, unknownSession
		}
		switch transport := r.URL.Query().Get("transport"); {
		case polls && transport == transports.POLLING && r.Method == http.MethodGet:
			t.poll(w, r)
			return
		case polls && transport == transports.POLLING && r.Method == http.MethodPost:
			t.post(w, r)
			return
		case polls && transport == transports.WEBSOCKET:
			t.peer.posts.Lock()
			ws, ok := s.serveEngine(w, r, t.peer).(*webSocket)
			t.peer.posts.Unlock()
			if ok {
				if !t.peer.carriedBy(nil) { // the UPGRADE of another one is being handled: v3.0.5 would wait 10 s for this one's
					ws.wire.Close()
				}
				go ws.read()
			}
			return
		case session.Upgraded() && transport == transports.WEBSOCKET:
			// The engine takes the connection and closes it. A refusal is an error to a client, which the public suite
			// does not expect.
			s.serveEngine(w, r, session.Request().Response().(*engineWriter).peer)
			return
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	io.WriteString(w, refusal)
}

// serveEngine has the library serve a handshake or an upgrade, and returns the transport that it made for p,
// nil if it refused. When this returns, every listener is attached: only now the transport may read. (v3.0.5
// reads at once, and loses the CONNECT of 1 client in some thousand.) The session keeps its first request
// for ever, hence the engine gets one that has nothing but what it needs: onSession takes even that away.
func (s *server) serveEngine(w http.ResponseWriter, r *http.Request, p *peer) transports.Transport {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // ends the goroutine of the library's HttpContext
	query := url.Values{}
	for _, key := range []string{"EIO", "transport", "sid"} {
		if v := r.URL.Query().Get(key); v != "" {
			query.Set(key, v)
		}
	}
	// No Origin: allowOrigin has checked it, and the library would ask for the same origin.
	header := http.Header{}
	for _, key := range []string{"Connection", "Upgrade", "Sec-Websocket-Key", "Sec-Websocket-Version"} {
		if v := r.Header.Values(key); len(v) > 0 {
			header[key] = v
		}
	}
	slim := &http.Request{Method: r.Method, URL: &url.URL{Path: r.URL.Path, RawQuery: query.Encode()},
		Proto: r.Proto, ProtoMajor: r.ProtoMajor, ProtoMinor: r.ProtoMinor, Header: header, Body: http.NoBody, RemoteAddr: r.RemoteAddr}
	e := &engineWriter{ResponseWriter: w, peer: p}
	s.engine.ServeHTTP(e, slim.WithContext(ctx))
	return e.transport
}

// engineWriter is the ResponseWriter that the engine sees. The session keeps this one for ever too,
// so it lets go of net/http's, and of 8 KiB of buffers, once a WebSocket has taken the connection over.
type engineWriter struct {
	http.ResponseWriter
	peer      *peer
	transport transports.Transport // set by the builders below
}

func (e *engineWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffers, err := http.NewResponseController(e.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	e.ResponseWriter = hijacked{}
	wire, err := newWire(conn, e.peer)
	return wire, buffers, err
}

type hijacked struct{}

func (hijacked) Header() http.Header       { return http.Header{} }
func (hijacked) WriteHeader(int)           {}
func (hijacked) Write([]byte) (int, error) { return 0, http.ErrHijacked }

// Rooms and fan-out

// rooms is the one index of who is in which room, and the library's adapter for it. The one of v3.0.5
// loses a member when a leave meets a join of the same room, encodes a broadcast anew for each member, and
// goes through a dozen locks and allocations for it (22 µs; this: about 5, of which 3.3 is the system call).
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
	r := &rooms{Adapter: socket.MakeAdapter(), members: make(map[socket.SocketId]*member), rooms: make(map[socket.Room]map[*member]bool)}
	r.Prototype(r)
	return r
}

// New makes rooms its own constructor: there is one namespace, hence one adapter.
func (r *rooms) New(nsp socket.Namespace) socket.Adapter {
	r.Construct(nsp)
	return r
}

// enter makes a connection known. Only then it may join, and DelAll forgets it.
func (r *rooms) enter(id socket.SocketId, p *peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[id] = &member{peer: p}
}

// mayJoin reports whether a connection is in a session's room already, or in less than maxRooms of them.
func (r *rooms) mayJoin(id socket.SocketId, room socket.Room) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.members[id]
	if m == nil || slices.Contains(m.rooms, room) {
		return true
	}
	sessions := len(m.rooms)
	if slices.Contains(m.rooms, adminRoom) {
		sessions--
	}
	return sessions < maxRooms
}

// AddAll is the library's join. It comes for each socket's private room too, which nothing here needs.
func (r *rooms) AddAll(id socket.SocketId, rooms *types.Set[socket.Room]) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.members[id]
	if m == nil { // gone, or not entered yet: its private room
		return
	}
	for _, room := range rooms.Keys() {
		if slices.Contains(m.rooms, room) {
			continue
		}
		m.rooms = append(m.rooms, room)
		if r.rooms[room] == nil {
			r.rooms[room] = make(map[*member]bool)
		}
		r.rooms[room][m] = true
	}
}

// Del is the library's leave.
func (r *rooms) Del(id socket.SocketId, room socket.Room) {
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
	return textFrame(slices.Concat([]byte(`42[`), name, []byte(`,`), data, []byte(`]`)))
}

// textFrame returns an unmasked WebSocket text frame (RFC 6455, section 5.2).
func textFrame(payload []byte) []byte {
	b := make([]byte, 0, 10+len(payload))
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x81, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x81, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x81, 127), uint64(n))
	}
	return append(b, payload...)
}

// payload undoes textFrame.
func payload(frame []byte) []byte {
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
	ID     string          `json:"id"`
	Rooms  []socket.Room   `json:"rooms"`
	Except socket.SocketId `json:"except,omitempty"`
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

// subscribe delivers what is published, until the subscription is lost. If one was lost before, messages of other
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
		c.server.refresh()
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
	delivered, _ := c.server.deliver(broadcastRequest{rooms: m.Rooms, except: m.Except, frame: []byte(frame)})
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
	m := clusterMessage{ID: rand.Text(), Rooms: b.rooms, Except: b.except}
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

// refresh has all clients reconnect, but not all at once.
func (s *server) refresh() {
	s.engine.Clients().Range(func(_ string, session engine.Socket) bool {
		time.AfterFunc(mathrand.N(refreshSpread), func() { session.Close(true) })
		return true
	})
}

// Transports
//
// Both are our own, on the library's public interface. Its own ones, at v3.0.5, start to read before anyone
// listens, queue without bound for a client that does not read, write to HTTP responses that have ended, hang
// a second poll and drop what is queued when they close. Here a peer holds what is on its way to a client,
// whatever carries it: a polling client's is fetched by its polls, a WebSocket client's is written to its
// wire at once. An upgrade hands the queue from the one to the other, so it loses and reorders nothing.

// peer is the far end of one Engine.IO session.
type peer struct {
	server  *server
	addr    string
	session engine.Socket

	mu       sync.Mutex
	client   *socket.Socket // in the namespace; nil: not yet
	wire     *wire          // nil as long as the client polls
	queue    [][]byte       // frames for the next poll, or held back
	queued   int            // bytes in it
	held     bool           // see sendPackets
	parked   chan struct{}  // wakes the poll that waits; nil: none does
	answer   string         // the packet that ends that poll, or the session: noop or close
	ending   bool           // takes nothing more; a poll may still fetch the queue …
	fetched  func()         // … which then calls this
	closed   bool
	pinged   time.Time  // when the PING left that is not answered yet; zero: none
	refilled time.Time  // when tokens was counted
	tokens   float64    // messages that the client may send now
	binary   int        // binary messages in a row
	posts    sync.Mutex // held by a POST: the packets of one come before those of the next; and by an upgrade: the engine has one at a time
}

const noopPacket, closePacket = "6", "1" // of Engine.IO

// send takes a frame on its way to the client, and reports whether it could. It never blocks.
func (p *peer) send(frame []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending {
		return false
	}
	if p.wire != nil && !p.held {
		return p.wire.send(frame)
	}
	if p.queued+len(frame) > maxBacklog {
		p.ending = true
		p.drop("it did not fetch its backlog")
		go p.session.Close(true) // not here: it takes the locks that a broadcast holds
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

// sendPackets is how the engine sends: its own packets, and Socket.IO's answers to this client.
func (p *peer) sendPackets(t transports.Transport, packets []*packet.Packet, send func(frame []byte) bool) {
	for _, pkt := range packets {
		if pkt.Type == packet.NOOP { // the engine ends the poll, so that the client can upgrade
			p.endPoll()
			continue
		}
		encoded, err := t.Parser().EncodePacket(pkt, false)
		if err != nil {
			continue // no packet of a kind that can't be encoded is ever made here
		}
		text := encoded.Bytes()
		p.mu.Lock()
		if pkt.Type == packet.PING {
			p.pinged = time.Now()
		}
		if bytes.HasPrefix(text, []byte(`40{`)) {
			// The engine acknowledges a CONNECT before its client knows the socket, and closes the connection of
			// one that answers at once with an event. So this and all that follows is held back until resume.
			p.held = true
		}
		p.mu.Unlock()
		send(textFrame(text))
	}
	t.Emit("drain")
}

// resume lets go of what sendPackets holds back: the client is in the namespace.
func (p *peer) resume(client *socket.Socket) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.client, p.held = client, false
	p.flush()
	p.wake()
}

// flush moves the queue to the wire, if there is one.
func (p *peer) flush() {
	if p.wire == nil || p.held {
		return
	}
	for _, frame := range p.queue {
		p.wire.send(frame)
	}
	p.queue, p.queued = nil, 0
}

// attach has the wire carry everything from here on: the client has sent UPGRADE on it.
func (p *peer) attach(w *wire) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wire != nil || p.ending || w.over() { // over: the engine has given the probe up
		return false
	}
	p.wire = w
	p.flush()
	p.wake()
	if pinged := p.pinged; !pinged.IsZero() { // v3.0.5 forgets at an upgrade that it waits for a PONG
		time.AfterFunc(time.Until(pinged.Add(p.server.pingTimeout)), func() {
			p.mu.Lock()
			silent := p.pinged.Equal(pinged)
			p.mu.Unlock()
			if silent {
				p.session.Close(true)
			}
		})
	}
	return true
}

// receive passes a client's packet on to the engine, as far as the client may send it and v3.0.5 can take it.
func (p *peer) receive(t transports.Transport, pkt *packet.Packet) {
	now := time.Now()
	_, binary := pkt.Data.(*types.BytesBuffer)
	p.mu.Lock()
	p.tokens = min(messageBurst, p.tokens+now.Sub(p.refilled).Seconds()*messageRate) - 1
	p.refilled = now
	if binary {
		p.binary++
	} else if pkt.Type == packet.MESSAGE {
		p.binary = 0
	}
	pinged := p.pinged
	if pkt.Type == packet.PONG {
		p.pinged = time.Time{}
	}
	ending, flooding, client := p.ending, p.tokens < 0 || p.binary > maxBinary, p.client
	p.mu.Unlock()

	early := min(time.Second, p.server.pingTimeout/4) - now.Sub(pinged)
	switch {
	case ending:
	case flooding:
		p.server.log.Debug("cut off: too many messages", "addr", p.addr)
		p.send(eventFrame([]byte(`"error"`), fmt.Appendf(nil, `{"message":"too many messages: at most %d a second"}`, messageRate)))
		p.session.Close(true)
	case pkt.Type == packet.PONG && pinged.IsZero():
		// Nobody asked: two PONGs that race each other leave one of the engine's timers behind.
	case pkt.Type == packet.PONG && early > 0:
		// The engine sends its PING first and then starts to wait for the answer: a PONG that is quicker
		// is forgotten, and the connection closed for a time-out.
		time.AfterFunc(early, func() { p.session.Transport().OnPacket(pkt) })
	case client != nil && client.Connected() && isDisconnect(pkt):
		// The namespace is left later than this returns, and a client that connects to it anew at once is
		// closed: so this waits.
		left := make(chan struct{})
		_ = client.Once("disconnect", func(...any) { close(left) })
		t.OnPacket(pkt)
		select {
		case <-left:
		case <-time.After(closeTimeout): // the connection closed at the same time
		}
	default:
		t.OnPacket(pkt)
	}
}

// isDisconnect reports whether a packet is Socket.IO's DISCONNECT ("1") of the namespace.
func isDisconnect(pkt *packet.Packet) bool {
	text, ok := pkt.Data.(*types.StringBuffer)
	return ok && pkt.Type == packet.MESSAGE && text.Len() == 1 && text.String() == "1"
}

// gone reports whether the session has closed, or its time-out is as good as over: a client that counts itself is
// some milliseconds ahead of the engine's timers, each of which is a goroutine.
func (p *peer) gone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	timeout := p.server.pingTimeout - min(p.server.pingTimeout/20, 10*time.Millisecond)
	return p.closed || !p.pinged.IsZero() && time.Since(p.pinged) > timeout
}

// endPoll answers the poll that waits, if one does.
func (p *peer) endPoll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.parked != nil {
		p.answer = noopPacket
		p.wake()
	}
}

// close gives the session's place back. Whatever has not left is lost.
func (p *peer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.ending, p.closed = true, true
	p.queue, p.queued = nil, 0
	p.wake()
	p.server.connections.Add(-1)
}

// drop counts and logs a client that is cut off because it does not read.
func (p *peer) drop(why string) {
	p.server.dropped.Add(1)
	p.server.log.Warn("client cut off", "why", why, "addr", p.addr)
}

// The polling transport: each GET waits for packets, each POST brings some.

type pollingBuilder struct{ transports.PollingBuilder }

func (*pollingBuilder) New(ctx *types.HttpContext) transports.Transport {
	e := ctx.Response().(*engineWriter)
	t := &polling{Transport: transports.MakeTransport(), peer: e.peer}
	t.Prototype(t)
	t.Construct(ctx)
	t.SetWritable(true) // always: the peer queues
	e.transport = t
	return t
}

type polling struct {
	transports.Transport
	peer *peer
}

func (*polling) Name() string { return transports.POLLING }

// OnRequest is called with the handshake only. It lets the engine return, see serveEngine.
func (*polling) OnRequest(ctx *types.HttpContext) { ctx.Flush() }

func (t *polling) Send(packets []*packet.Packet) { t.peer.sendPackets(t, packets, t.peer.send) }

func (t *polling) poll(w http.ResponseWriter, r *http.Request) {
	payload, err := t.peer.fetch(r.Context())
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(pollTimeout))
	if err != nil {
		if err != errUpgraded { // a second poll at once, or the client went away: both end the session
			t.OnError(err.Error(), err)
		}
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=UTF-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(payload)
}

func (t *polling) post(w http.ResponseWriter, r *http.Request) {
	fail := func(status int, reason string, err error) {
		t.OnError(reason, err)
		http.Error(w, reason, status)
	}
	body, status, err := readBody(w, r, maxMessage)
	if err != nil {
		fail(status, err.Error(), err)
		return
	}
	packets, err := t.Parser().DecodePayload(types.NewStringBuffer(body))
	if err != nil || len(packets) == 0 {
		fail(http.StatusBadRequest, "invalid packet", err)
		return
	}
	t.peer.posts.Lock()
	defer t.peer.posts.Unlock()
	for _, pkt := range packets {
		if pkt.Type == packet.CLOSE {
			// It may have overtaken the client's last poll, which is on another connection.
			if t.peer.end(noopPacket, t.OnClose) {
				time.AfterFunc(overtakeTimeout, t.OnClose)
			}
			break
		}
		t.peer.receive(t, pkt)
	}
	w.Header().Set("Content-Type", "text/html") // as Node has it: some browsers offer text/plain as a download
	io.WriteString(w, "ok")
}

func (t *polling) DoClose(fn types.Callable) {
	closed := sync.OnceFunc(func() {
		if fn != nil {
			fn()
		}
		t.OnClose()
	})
	if t.peer.end(closePacket, closed) && fn != nil {
		time.AfterFunc(closeTimeout, closed)
	} else {
		closed()
	}
}

func (t *polling) OnClose() {
	if t.peer.carriedBy(nil) { // else it is upgraded, and the wire carries on
		t.peer.close()
	}
	t.Transport.OnClose()
}

var (
	errOverlap  = errors.New("two polls at once")
	errUpgraded = errors.New("this session has left polling")
)

// fetch waits for something to send, and returns it as one Engine.IO payload.
func (p *peer) fetch(ctx context.Context) ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wire != nil {
		return nil, errUpgraded
	}
	if p.parked != nil {
		return nil, errOverlap
	}
	parked := make(chan struct{}, 1)
	p.parked = parked // for good where the session ends with this poll: the next one is refused
	for (len(p.queue) == 0 || p.held) && p.answer == "" && !p.closed && p.wire == nil {
		p.mu.Unlock()
		select {
		case <-parked:
		case <-ctx.Done():
		}
		p.mu.Lock()
		if err := ctx.Err(); err != nil && p.wire == nil {
			return nil, err
		}
	}
	if p.wire != nil {
		return nil, errUpgraded
	}
	var packets [][]byte
	for _, frame := range p.queue {
		packets = append(packets, payload(frame))
	}
	p.queue, p.queued = nil, 0
	if p.closed && p.answer == "" {
		p.answer = closePacket
	}
	if p.answer == closePacket || p.answer == noopPacket && len(packets) == 0 {
		packets = append(packets, []byte(p.answer))
	}
	p.answer = ""
	if !p.ending {
		p.parked = nil
	}
	if p.fetched != nil {
		go p.fetched() // not under the lock
	}
	return bytes.Join(packets, []byte{0x1e}), nil
}

// end refuses what comes from here on. It reports whether there is a last poll to answer, which then calls fetched.
func (p *peer) end(answer string, fetched func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.wire != nil {
		return false
	}
	p.ending, p.answer, p.fetched = true, answer, fetched
	p.wake()
	return true
}

// carriedBy reports whether the peer's frames go to that wire; nil: they wait for polls.
func (p *peer) carriedBy(w *wire) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wire == w
}

// The WebSocket transport: gorilla's connection reads, the wire writes.

type webSocketBuilder struct{ transports.WebSocketBuilder }

func (*webSocketBuilder) New(ctx *types.HttpContext) transports.Transport {
	e := ctx.Response().(*engineWriter)
	t := &webSocket{Transport: transports.MakeTransport(), peer: e.peer, conn: ctx.Websocket, wire: ctx.Websocket.NetConn().(*wire)}
	t.Prototype(t)
	t.Construct(ctx)
	t.SetWritable(true)
	if !ctx.Query().Has("sid") {
		t.peer.attach(t.wire)
	}
	e.transport = t
	return t
}

type webSocket struct {
	transports.Transport
	peer *peer
	conn *types.WebSocketConn
	wire *wire
}

func (*webSocket) Name() string { return transports.WEBSOCKET }

// OnRequest is called with the handshake, and with a request for transport=websocket that is no upgrade,
// which v3.0.5 leaves without an answer for ever.
func (*webSocket) OnRequest(ctx *types.HttpContext) {
	if ctx.Websocket == nil {
		_ = ctx.SetStatusCode(http.StatusBadRequest)
		io.WriteString(ctx, badRequest)
	}
}

func (t *webSocket) Send(packets []*packet.Packet) {
	send := t.peer.send
	if !t.peer.carriedBy(t.wire) { // the answer to a probe
		send = t.wire.send
	}
	t.peer.sendPackets(t, packets, send)
}

// read passes on what the client sends until the connection ends. It is a goroutine of its own.
func (t *webSocket) read() {
	defer t.OnClose()
	defer t.peer.server.recovered("reading from a client failed")
	for {
		kind, r, err := t.conn.NextReader()
		if err != nil {
			return
		}
		message := types.NewStringBuffer(nil)
		if kind == 2 { // binary, RFC 6455, section 11.8
			message = types.NewBytesBuffer(nil)
		}
		if _, err := message.ReadFrom(r); err != nil {
			return
		}
		pkt, err := t.Parser().DecodePacket(message)
		if err != nil || pkt.Type == packet.CLOSE {
			return
		}
		if pkt.Type == packet.UPGRADE && !t.peer.carriedBy(t.wire) && !t.peer.attach(t.wire) {
			return
		}
		t.peer.receive(t, pkt)
	}
}

// DoClose says goodbye. The reader ends when the client has answered, or after closeTimeout.
func (t *webSocket) DoClose(fn types.Callable) {
	t.wire.shut()
	if fn != nil {
		fn()
	}
}

func (t *webSocket) OnClose() {
	t.wire.Close()
	if t.peer.carriedBy(t.wire) {
		t.peer.close()
	}
	t.Transport.OnClose()
}

const closeFrame = 0x88 // its first byte: RFC 6455, section 5.2

// wire is a WebSocket's connection with one way to write, which never blocks: what the socket takes at once
// costs one system call and no allocation, the rest goes to a backlog that a goroutine drains. Everything
// takes this way, gorilla's pongs and closes too, hence frames never interleave.
type wire struct {
	net.Conn
	raw  syscall.RawConn
	peer *peer
	paid time.Time // until when, at readRate, what was read is paid for

	mu       sync.Mutex
	backlog  [][]byte
	size     int  // bytes in the backlog
	draining bool // the backlog's goroutine writes, and nobody else
	shutting bool // a close frame, this program's or gorilla's answer to one, is on its way and the last
	dead     bool

	// The system call under way: set by whoever writes, and fields so that try need not be a new closure each time.
	try  func(fd uintptr) bool
	out  []byte
	wait bool // until the socket takes something
	n    int
	err  error
}

func newWire(conn net.Conn, p *peer) (*wire, error) {
	raw, err := conn.(syscall.Conn).SyscallConn() // net/http hands out a *net.TCPConn
	w := &wire{Conn: conn, raw: raw, peer: p}
	w.try = func(fd uintptr) bool {
		for {
			w.n, w.err = syscall.Write(int(fd), w.out)
			if w.err != syscall.EINTR {
				return !(w.wait && w.err == syscall.EAGAIN)
			}
		}
	}
	return w, err
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

// Read slows a client down that sends without end what is not a message and hence costs no token: WebSocket's pings
// and pongs, empty fragments.
func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if full := time.Now().Add(-readBurst); w.paid.Before(full) {
		w.paid = full
	}
	w.paid = w.paid.Add(time.Duration(n) * time.Second / readRate)
	time.Sleep(time.Until(w.paid))
	return n, err
}

// send takes a frame, which nobody may change from here on, and reports whether it is on its way.
func (w *wire) send(frame []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead || w.shutting {
		return false
	}
	w.shutting = frame[0] == closeFrame
	if !w.draining {
		n, err := w.write(frame, false)
		if err != nil {
			w.kill() // the reader cleans up
			return false
		}
		if n == len(frame) {
			return true
		}
		frame = frame[n:]
		w.draining = true
		go w.drain()
	}
	if w.size+len(frame) > maxBacklog {
		w.kill()
		w.peer.drop("its backlog is full")
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
		_ = w.Conn.SetWriteDeadline(time.Now().Add(stallTimeout))
		n, err := w.write(frame, true)
		w.mu.Lock()
		if w.dead {
			return
		}
		if err != nil {
			w.kill()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				w.peer.drop("it took nothing for " + stallTimeout.String())
			}
			return
		}
		w.size -= n
		if n < len(frame) {
			w.backlog[0] = frame[n:]
		} else {
			w.backlog = w.backlog[1:]
		}
	}
	w.backlog = nil
	w.draining = false
	_ = w.Conn.SetWriteDeadline(time.Time{}) // a deadline that has passed fails even a write that need not wait
}

// kill ends the connection at once; what is under way to the client is lost, and frees its memory in the kernel too.
func (w *wire) kill() {
	w.dead, w.backlog = true, nil
	_ = w.Conn.(*net.TCPConn).SetLinger(0)
	w.Conn.Close()
}

// over reports whether the wire takes nothing more.
func (w *wire) over() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dead || w.shutting
}

// shut sends a close frame (1001, going away) behind everything else, and gives the client closeTimeout to take it.
func (w *wire) shut() {
	w.send([]byte{closeFrame, 2, 1001 >> 8, 1001 & 0xff})
	_ = w.Conn.SetReadDeadline(time.Now().Add(closeTimeout))
}

// Write is for gorilla, which uses its buffer again.
func (w *wire) Write(b []byte) (int, error) {
	if !w.send(bytes.Clone(b)) {
		return 0, net.ErrClosed
	}
	return len(b), nil
}

// SetDeadline leaves the write deadline to drain. gorilla sets one for each frame of its own.
func (w *wire) SetDeadline(t time.Time) error    { return w.Conn.SetReadDeadline(t) }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

func (w *wire) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dead, w.backlog = true, nil
	return w.Conn.Close()
}
