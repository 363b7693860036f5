<!doctype html>
<html lang="en">
<head>
    <meta charset="utf-8">
    <title>{{ $page }}</title>
    <link rel="stylesheet" href="/build/app.css">
</head>
<body>
    <div id="app" data-page="{{ $page }}" data-session-id="{{ $sessionId }}"></div>
    <script type="module" src="/build/{{ ['widget' => 'react19', 'vue' => 'vue'][$page] ?? 'react18' }}.js"></script>
</body>
</html>
