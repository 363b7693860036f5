package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	secret = "a-secret-for-this-run-only-0123456789"
	host   = "127.0.0.1"
)

// server is one that is measured: how it is started, and the few texts by which it differs from the others.
type server struct {
	name    string
	command []string
	env     []string // beside this process's own
	speaks  protocol

	addr string
}

// protocol is what a server's clients and publishers say. What they listen for is the mark in a message, whatever is around it.
type protocol interface {
	open(c *client) (path, header string)
	join(c *client, room string) error
	pong(opcode byte, payload []byte) []byte // a frame; nil: the payload is no ping
	post(addr, room, text string) (path, header, body string)
}

func (s *server) open(c *client) (path, header string) { return s.speaks.open(c) }
func (s *server) join(c *client, room string) error    { return s.speaks.join(c, room) }
func (s *server) post(room, text string) (path, header, body string) {
	return s.speaks.post(s.addr, room, text)
}

func (s *server) pong(opcode byte, payload []byte) []byte {
	if opcode == opPing {
		return masked(opPong, payload)
	}
	return s.speaks.pong(opcode, payload)
}

// servers returns all that can be measured, in the order of the table. bin is where run has put what it built; a server that
// is not there is left out, and run has said why.
func servers(bin string, port int) []*server {
	p := strconv.Itoa(port)
	node := []string{"SOCKET_PORT=" + p, "SOCKETIO_SECRET=" + secret, "NODE_ENV=production"}
	all := []*server{
		{name: "daemon", command: []string{bin + "/socketio"}, speaks: socketIO{},
			env: []string{"SOCKET_PORT=" + p, "SOCKETIO_SECRET=" + secret, "MAX_CONNECTIONS=19900"}},
		{name: "Node", command: []string{"node", bin + "/node/server.mjs"}, speaks: socketIO{}, env: node},
		{name: "Bun", command: []string{bin + "/bun", bin + "/node/server.bun.mjs"}, speaks: socketIO{}, env: node},
		// Its documents on scalability: the two buffers. All else is its default, as in a configuration that genconfig makes.
		{name: "Centrifugo", command: []string{bin + "/centrifugo"}, speaks: centrifugo{}, env: []string{
			"CENTRIFUGO_HTTP_SERVER_ADDRESS=" + host, "CENTRIFUGO_HTTP_SERVER_PORT=" + p, "CENTRIFUGO_HTTP_API_KEY=" + secret,
			"CENTRIFUGO_CLIENT_TOKEN_HMAC_SECRET_KEY=" + secret, "CENTRIFUGO_CLIENT_ALLOWED_ORIGINS=https://chat.example.com",
			"CENTRIFUGO_WEBSOCKET_USE_WRITE_BUFFER_POOL=true", "CENTRIFUGO_WEBSOCKET_READ_BUFFER_SIZE=512"}},
		// Without Rails: tokens and signed streams, and messages by HTTP, as its documents say for other back ends.
		{name: "AnyCable", command: []string{bin + "/anycable-go"}, speaks: anyCable{}, env: []string{
			"ANYCABLE_HOST=" + host, "ANYCABLE_PORT=" + p, "ANYCABLE_SECRET=" + secret, "ANYCABLE_NORPC=true", "ANYCABLE_ENFORCE_JWT=true",
			"ANYCABLE_BROADCAST_ADAPTER=http", "ANYCABLE_HTTP_BROADCAST_PORT=" + p, "ANYCABLE_BROADCAST_KEY=" + secret}},
		{name: "Reverb", command: []string{bin + "/reverb/start"}, speaks: pusher{}, env: []string{
			"REVERB_SERVER_HOST=" + host, "REVERB_SERVER_PORT=" + p, "REVERB_APP_ID=bench", "REVERB_APP_KEY=bench", "REVERB_APP_SECRET=" + secret}},
		{name: "soketi", command: []string{bin + "/soketi/start"}, speaks: pusher{}, env: []string{
			"SOKETI_HOST=" + host, "SOKETI_PORT=" + p, "SOKETI_DEFAULT_APP_ID=bench", "SOKETI_DEFAULT_APP_KEY=bench", "SOKETI_DEFAULT_APP_SECRET=" + secret,
			"SOKETI_METRICS_ENABLED=false", "NODE_ENV=production"}},
		{name: "one write", command: []string{bin + "/writes"}, speaks: socketIO{}, env: []string{"SOCKET_PORT=" + p}},
	}
	for _, other := range strings.Fields(*also) {
		name, path, _ := strings.Cut(other, "=")
		s := *all[0]
		s.name, s.command = name, []string{path}
		all = append(all, &s)
	}
	var there []*server
	for _, s := range all {
		s.addr = host + ":" + p
		if _, err := os.Stat(s.command[len(s.command)-1]); err == nil {
			there = append(there, s)
		}
	}
	return there
}

func sign(text string) []byte {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

// token returns a JSON Web Token, which Laravel would give to a page.
func token(claims map[string]any) string {
	claims["exp"] = time.Now().Add(time.Hour).Unix()
	text, _ := json.Marshal(claims)
	encode := base64.RawURLEncoding.EncodeToString
	unsigned := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode(text)
	return unsigned + "." + encode(sign(unsigned))
}

func data(text string) string { return fmt.Sprintf(`{"id":12345,"author":"Ada","text":"%s"}`, text) }

const bearer = "Authorization: Bearer " + secret + "\r\n"

// socketIO is the daemon's, and that of the servers on Socket.IO.
type socketIO struct{}

func (socketIO) open(*client) (path, header string) {
	return "/socket.io/?EIO=4&transport=websocket", ""
}

func (socketIO) join(c *client, room string) error {
	if _, err := c.hear("0{"); err != nil {
		return err
	}
	if err := c.say("40"); err != nil {
		return err
	}
	connected, err := c.hear("40{")
	if err != nil {
		return err
	}
	var socket struct{ Sid string }
	if err := json.Unmarshal(connected[2:], &socket); err != nil {
		return err
	}
	auth := hex.EncodeToString(sign(socket.Sid + ":chat-session." + room))
	if err := c.say(fmt.Sprintf(`42["join-session",{"sessionId":"%s","userType":"guest","auth":"%s"}]`, room, auth)); err != nil {
		return err
	}
	_, err = c.hear(`42["joined-session"`)
	return err
}

func (socketIO) pong(_ byte, payload []byte) []byte {
	if string(payload) == "2" {
		return masked(opText, []byte("3"))
	}
	return nil
}

func (socketIO) post(_, room, text string) (path, header, body string) {
	return "/broadcast", bearer, fmt.Sprintf(`{"channel":"chat-session.%s","event":"message.sent","data":%s}`, room, data(text))
}

type centrifugo struct{}

func (centrifugo) open(*client) (path, header string) { return "/connection/websocket", "" }

func (centrifugo) join(c *client, room string) error {
	user := strconv.Itoa(c.number)
	if err := c.say(fmt.Sprintf(`{"id":1,"connect":{"token":"%s"}}`, token(map[string]any{"sub": user}))); err != nil {
		return err
	}
	if _, err := c.hear(`{"id":1,"connect":{`); err != nil {
		return err
	}
	if err := c.say(fmt.Sprintf(`{"id":2,"subscribe":{"channel":"%s","token":"%s"}}`, room, token(map[string]any{"sub": user, "channel": room}))); err != nil {
		return err
	}
	_, err := c.hear(`{"id":2,"subscribe":{`)
	return err
}

func (centrifugo) pong(_ byte, payload []byte) []byte {
	if string(bytes.TrimSpace(payload)) == "{}" {
		return masked(opText, []byte("{}"))
	}
	return nil
}

func (centrifugo) post(_, room, text string) (path, header, body string) {
	return "/api/publish", "X-API-Key: " + secret + "\r\n", fmt.Sprintf(`{"channel":"%s","data":%s}`, room, data(text))
}

type anyCable struct{}

func (anyCable) open(c *client) (path, header string) {
	return "/cable?jid=" + token(map[string]any{"ext": fmt.Sprintf(`{"user":%d}`, c.number)}), "Sec-WebSocket-Protocol: actioncable-v1-json\r\n"
}

func (anyCable) join(c *client, room string) error {
	if _, err := c.hear(`{"type":"welcome"`); err != nil {
		return err
	}
	stream := base64.StdEncoding.EncodeToString([]byte(strconv.Quote(room)))
	stream += "--" + hex.EncodeToString(sign(stream))
	identifier := fmt.Sprintf(`{"channel":"$pubsub","signed_stream_name":"%s"}`, stream)
	if err := c.say(fmt.Sprintf(`{"command":"subscribe","identifier":%q}`, identifier)); err != nil {
		return err
	}
	for {
		answer, err := c.hear(`{`)
		if err != nil || bytes.Contains(answer, []byte(`"confirm_subscription"`)) {
			return err
		}
		if !bytes.Contains(answer, []byte(`"type":"ping"`)) {
			return fmt.Errorf("got %.200q", answer)
		}
	}
}

func (anyCable) pong(byte, []byte) []byte { return nil } // Action Cable's pings want none

func (anyCable) post(_, room, text string) (path, header, body string) {
	return "/_broadcast", bearer, fmt.Sprintf(`{"stream":"%s","data":%q}`, room, data(text))
}

// pusher is Reverb's and soketi's.
type pusher struct{}

func (pusher) open(*client) (path, header string) {
	return "/app/bench?protocol=7&client=js&version=8.4.0", ""
}

func (pusher) join(c *client, room string) error {
	established, err := c.hear(`{"event":"pusher:connection_established"`)
	if err != nil {
		return err
	}
	var event struct{ Data string }
	var socket struct{ Socket_id string }
	if err := json.Unmarshal(established, &event); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(event.Data), &socket); err != nil {
		return err
	}
	channel := "private-" + room
	auth := "bench:" + hex.EncodeToString(sign(socket.Socket_id+":"+channel))
	if err := c.say(fmt.Sprintf(`{"event":"pusher:subscribe","data":{"auth":"%s","channel":"%s"}}`, auth, channel)); err != nil {
		return err
	}
	_, err = c.hear(`{"event":"pusher_internal:subscription_succeeded"`)
	return err
}

func (pusher) pong(_ byte, payload []byte) []byte {
	if bytes.HasPrefix(payload, []byte(`{"event":"pusher:ping"`)) {
		return masked(opText, []byte(`{"event":"pusher:pong","data":{}}`))
	}
	return nil
}

// post signs the request, as Pusher's library does.
func (pusher) post(_, room, text string) (path, header, body string) {
	body = fmt.Sprintf(`{"name":"message.sent","data":%q,"channels":["private-%s"]}`, data(text), room)
	sum := md5.Sum([]byte(body))
	query := fmt.Sprintf("auth_key=bench&auth_timestamp=%d&auth_version=1.0&body_md5=%s", time.Now().Unix(), hex.EncodeToString(sum[:]))
	path = "/apps/bench/events"
	signature := hex.EncodeToString(sign(strings.Join([]string{"POST", path, query}, "\n")))
	return path + "?" + query + "&auth_signature=" + signature, "", body
}
