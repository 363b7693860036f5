// Command writes does one write for each delivery, and nothing else that can be left out: it speaks enough of Socket.IO to be
// measured beside the daemon. It is no floor: who lets several messages leave in one write needs less than it.
package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
)

var (
	mu    sync.Mutex // held while a message is written: so all members have one order
	rooms = make(map[string][]net.Conn)
)

func main() {
	http.HandleFunc("/socket.io/", open)
	http.HandleFunc("POST /broadcast", broadcast)
	fmt.Fprintln(os.Stderr, http.ListenAndServe("127.0.0.1:"+os.Getenv("SOCKET_PORT"), nil))
	os.Exit(1)
}

func open(w http.ResponseWriter, r *http.Request) {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // RFC 6455, section 4.2.2
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	go serve(conn, rw.Reader)
}

func serve(conn net.Conn, r *bufio.Reader) {
	room := ""
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for i, member := range rooms[room] {
			if member == conn {
				rooms[room] = append(rooms[room][:i], rooms[room][i+1:]...)
				break
			}
		}
		conn.Close()
	}()
	conn.Write(frame(`0{"sid":"x","upgrades":[],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000}`))
	for {
		text, err := read(r)
		switch {
		case err != nil:
			return
		case text == "40":
			conn.Write(frame(`40{"sid":"y"}`))
		case strings.HasPrefix(text, `42["join-session"`):
			var event [2]json.RawMessage
			var argument struct{ SessionID string }
			_ = json.Unmarshal([]byte(text[2:]), &event)
			_ = json.Unmarshal(event[1], &argument)
			room = "chat-session." + argument.SessionID
			mu.Lock()
			rooms[room] = append(rooms[room], conn)
			mu.Unlock()
			conn.Write(frame(`42["joined-session",{}]`))
		}
	}
}

// read reads a frame of fewer than 64 KiB, masked with zeros, as the load's are.
func read(r *bufio.Reader) (string, error) {
	head := make([]byte, 8)
	if _, err := io.ReadFull(r, head[:2]); err != nil {
		return "", err
	}
	size, more := int(head[1]&127), 4
	if size == 126 {
		more = 6
	}
	if _, err := io.ReadFull(r, head[2:2+more]); err != nil {
		return "", err
	}
	if size == 126 {
		size = int(head[2])<<8 | int(head[3])
	}
	text := make([]byte, size)
	_, err := io.ReadFull(r, text)
	return string(text), err
}

func frame(text string) []byte {
	if n := len(text); n > 125 {
		return append([]byte{0x81, 126, byte(n >> 8), byte(n)}, text...)
	}
	return append([]byte{0x81, byte(len(text))}, text...)
}

func broadcast(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Channel, Event string
		Data           json.RawMessage
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f := frame(fmt.Sprintf(`42[%q,%s]`, body.Event, body.Data))
	mu.Lock()
	for _, member := range rooms[body.Channel] {
		member.Write(f)
	}
	mu.Unlock()
	io.WriteString(w, `{"success":true}`)
}
