package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a server that runs.
type process struct {
	*server
	command *exec.Cmd
	log     *os.File
	ended   chan struct{}
}

// start starts a server, and waits until it listens.
func start(s *server) (*process, error) {
	p := &process{server: s, command: exec.Command(s.command[0], s.command[1:]...), ended: make(chan struct{})}
	var err error
	if p.log, err = os.CreateTemp("", "bench-*.log"); err != nil {
		return nil, err
	}
	p.command.Env = append(os.Environ(), s.env...)
	p.command.Stdout, p.command.Stderr = p.log, p.log
	p.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.command.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.command.Wait()
		close(p.ended)
	}()
	for end := time.Now().Add(patience); ; {
		conn, err := net.Dial("tcp", s.addr)
		if err == nil {
			conn.Close()
			return p, nil
		}
		select {
		case <-p.ended:
			err = errors.New("it has ended")
		case <-time.After(10 * time.Millisecond): // no server says it in one way that it listens
			if time.Now().Before(end) {
				continue
			}
		}
		log, _ := os.ReadFile(p.log.Name())
		p.stop()
		return nil, fmt.Errorf("start: %w\n%s", err, log)
	}
}

// stop asks the server to end, and ends it if it does not.
func (p *process) stop() {
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = p.command.Process.Kill()
		<-p.ended
	}
	p.log.Close()
	os.Remove(p.log.Name())
}

// busy returns the time that anybody has had on all cores of this machine (proc(5)).
func busy() time.Duration {
	stat, _ := os.ReadFile("/proc/stat")
	fields := strings.Fields(strings.SplitN(string(stat), "\n", 2)[0])
	var ticks int
	for i, field := range fields[1:] {
		if n, _ := strconv.Atoi(field); i < 3 || i == 5 || i == 6 { // user, nice, system, and interrupts
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// own returns the time that this process and the servers that have ended have had.
func own() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var usage syscall.Rusage
		_ = syscall.Getrusage(who, &usage)
		sum += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	return sum
}

// cpu returns the time on a core that the server has had, in steps of 10 ms (proc(5)).
func (p *process) cpu() time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.command.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// resident returns the bytes of memory that the server has.
func (p *process) resident() float64 {
	var size, pages float64
	statm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.command.Process.Pid))
	_, _ = fmt.Sscan(string(statm), &size, &pages)
	return pages * float64(os.Getpagesize())
}
