<!doctype html>
<meta charset="utf-8">
<div id="app" data-session-id="{{ $chat->id }}" data-user="{{ $user->id }}"></div>
<script type="module" src="/build/{{ $page }}.js"></script>
